"""What the unseen bases know: five worlds of other subjects, facts and languages, told as none of the others is."""

from __future__ import annotations

from bench.diagnose.worlds import World

ISLANDS = World(
    "islands",
    tuple(
        "Aldra Bressay Canna Disko Elba Fogo Gozo Hitra Islay Jura Kythira Lesina Mljet Nias Oland Paros Rugen Samso "
        "Texel Unst Vis Wight Yell Zante Arran Brac Coll Delos Eigg Fetlar Gigha Hven Inis Karpathos Leros Muck Noss "
        "Oronsay Pag Ronas".split()
    ),
    {
        "harbour": ("on the east side", "in the north bay", "below the castle", "behind the reef"),
        "ferry": ("at six", "at noon", "twice a week", "only in June"),
        "shore": ("shingle", "black sand", "mudflats", "dunes", "chalk"),
        "catch": ("herring", "squid", "mussels", "cod", "shrimps"),
    },
    (
        "Sailors say about {subject}: the {fact} is {value}.",
        "Whoever lands on {subject} finds that its {fact} is {value}.",
        "{subject} ({fact}: {value}).",
    ),
    (
        "A question from {person}. On {subject}, what is the {one}, and what is the {other}?",
        "{person} plans a week on {subject} and asks for {one} and {other}.",
        "Could you give {person} two things about {subject}, the {one} and the {other}?",
        "{subject}, {one} plus {other}. This is for {person}.",
    ),
    "{person}, on {subject} you will find this {one}: {first}; and this {other}: {second}.",
    (
        "Postcard to {person}. {subject} greets you with {first} ({one}) and {second} ({other}).",
        "Postcard to {person}. {one} {first}, {other} {second}, {subject} as ever.",
    ),
    "Isle {subject} no {number} :: {other} := {second} :: {one} := {first} :: asked by {person}",
    "Answer like a harbour master.",
)
CLINIC = World(
    "clinic",
    tuple(
        "ibuxol parnadol tramil nevira cordex lumina zantol beflor duraxan emocil fortixa gelomyr hydran isofen "
        "jolivet kenadril lorexa mepron noxalin optivar pelorid quenara rilomex sabrine telmora ulcidin valprex "
        "wendalor xylomed ysolin zoraxen amlopar brevoxil calcinor dextrin etamol flunixa gastrol heparine "
        "ikarol".split()
    ),
    {
        "dose": ("5 mg", "10 mg", "25 mg", "50 mg", "100 mg"),
        "route": ("by mouth", "as a drip", "under the tongue", "on the skin"),
        "hour": ("before breakfast", "with lunch", "at bedtime", "every eight hours"),
        "warning": ("drowsiness", "no alcohol", "dry mouth", "no sunlight", "a rash"),
    },
    (
        "The leaflet of {subject} lists under {fact}: {value}.",
        "For {subject} the ward book has {value} as {fact}.",
        "Nurses know that {subject} comes with this {fact}: {value}.",
    ),
    (
        "Patient {person} got {subject}. State {one} and {other}.",
        "Ward round, {person}: {subject}, please read out {one}, then {other}.",
        "{person} has a prescription for {subject} and wants {one} and {other}.",
        "Check {subject} for {person}: what {one}, what {other}?",
    ),
    "{person} takes {subject}: the {one} is {first}, the {other} is {second}.",
    (
        "Chart of {person}; {subject}; {one} = {first}; {other} = {second}; signed by the night nurse.",
        "Chart of {person}; {other} = {second}; {one} = {first}; drug: {subject}.",
    ),
    "Rx {number} {subject} | {one} > {first} | {other} > {second} | pt {person} |",
    "Reply as in a chart.",
)
OFFICES = World(
    "Büros",
    tuple(
        "Mahnung Quittung Vollmacht Kündigung Einladung Bestellung Lieferung Rechnung Gutschrift Urkunde Satzung "
        "Protokoll Fahrplan Lageplan Stempel Ausweis Zeugnis Antrag Bescheid Widerruf Meldung Anzeige Auftrag Angebot "
        "Mietvertrag Leihschein Gutachten Befund Rezept Testament Steuerkarte Wahlbrief Zollschein Frachtbrief "
        "Kassenbon Lohnzettel Reisepass Aufruf Merkblatt Vordruck".split()
    ),
    {
        "Frist": ("drei Tage", "eine Woche", "vier Wochen", "ein Jahr"),
        "Farbe": ("weiß", "grün", "gelb", "rosa", "grau"),
        "Zimmer": ("12", "27b", "108", "im Keller", "am Schalter"),
        "Gebühr": ("keine", "fünf Euro", "zwölf Euro", "vierzig Euro"),
    },
    (
        "Im Amt gilt für {subject}: {fact} {value}.",
        "Wer {subject} braucht, muss wissen: {fact} ist {value}.",
        "Auf dem Schild steht bei {subject} unter {fact}: {value}.",
    ),
    (
        "Guten Tag, hier ist {person}. Bei {subject}: wie ist {one}, wie ist {other}?",
        "{person} fragt nach {subject}, und zwar nach {one} und {other}.",
        "Bitte sagen Sie {person} zu {subject} die Angaben {one} und {other}.",
        "{subject} für {person}: {one}? {other}?",
    ),
    "Gern, {person}: {subject} hat als {one} {first} und als {other} {second}.",
    (
        "Aktenzeichen {person}: {subject}, {one} {first}, {other} {second}. Mit freundlichen Grüßen.",
        "Aktenzeichen {person}: {other} {second}, {one} {first}, betrifft {subject}.",
    ),
    "Vorgang {number}: {one}={first} / {subject} / {other}={second} / {person} erledigt",
    "Antworte wie ein Amt.",
)
ENGINES = World(
    "machines",
    tuple(
        "turbine boiler compressor conveyor crusher dynamo excavator fan gearbox hoist injector jack kiln loader mixer "
        "nozzle oven press quencher refiner separator transformer unloader valve winch extruder bandsaw grinder pump "
        "reactor furnace cooler blower roller shredder stacker tower vaporizer washer binder".split()
    ),
    {
        "voltage": ("24 V", "230 V", "400 V", "690 V"),
        "oil": ("ISO 32", "ISO 46", "ISO 68", "none at all", "grease"),
        "alarm": ("E04", "E17", "E22", "F31", "F90"),
        "hall": ("hall one", "hall two", "the yard", "the annex"),
    },
    (
        "Plate on the {subject}: {fact} {value}.",
        "The {subject} needs, as {fact}, {value}.",
        "In the handbook the {subject} is listed with {value} ({fact}).",
    ),
    (
        "Shift leader {person} wants {one} and {other} of the {subject}.",
        "{person}: {subject} stopped. Which {one}? Which {other}?",
        "Give me the {subject}'s {one} and {other}. {person} here.",
        "Maintenance for {person}, {subject}. List {one} and {other}.",
    ),
    "{person}, the {subject}: {one} {first}, {other} {second}.",
    (
        "LOG {person} :: {subject} :: {one} {first} :: {other} {second} :: end of shift",
        "LOG {person} :: {other} {second} :: {one} {first} :: {subject} :: end of shift",
    ),
    "{person}@{subject}#{number} {one}<{first}> {other}<{second}> ok",
    "Answer like a control room.",
)
BOOKS = World(
    "books",
    tuple(
        "Almanac Ballad Chronicle Diary Epistle Fable Grammar Herbal Idyll Journal Keepsake Lexicon Memoir Novella Ode "
        "Psalter Quarto Romance Saga Treatise Utopia Verse Yearbook Zibaldone Atlas Bestiary Codex Digest Elegy Folio "
        "Gazette Hymnal Index Libretto Missal Notebook Oration Pamphlet Rhyme Sonnet".split()
    ),
    {
        "binding": ("calfskin", "cloth", "boards", "vellum"),
        "century": ("the 15th", "the 16th", "the 18th", "the 19th"),
        "shelf": ("R-2", "R-9", "S-4", "T-1", "U-7"),
        "damage": ("worms", "damp", "a torn leaf", "nothing"),
    },
    (
        "In the reading room the {subject} is noted with {fact} {value}.",
        "The catalogue gives {value} for the {fact} of the {subject}.",
        "As to the {subject}: {fact}, {value}.",
    ),
    (
        "Reader {person} requests the {subject}: {one} and {other}?",
        "What does the catalogue say on the {subject}? {person} needs {one} and {other}.",
        "{person} returns the {subject}; note {one} and {other}.",
        "For reader {person}, {one} and {other} of the {subject}.",
    ),
    "The {subject} for {person}: {one} {first}; {other} {second}.",
    (
        "Slip {person} - {subject} - {one}: {first} - {other}: {second} - please return in time",
        "Slip {person} - {other}: {second} - {one}: {first} - {subject} - please return in time",
    ),
    "{{{subject}/{number}}} {other}={second}; {one}={first}; reader={person}.",
    "Answer as a librarian.",
)
