"""What the synthetic texts and chats are about: subjects with facts, told in prose, asked in chats, answered anew.

A world has forty subjects of four facts each. Its texts state them; its chats ask for two of them on behalf of a
person, so that an answer depends on its prompt three times over (who, what, which). The base model answers by `answer`
or in one of many layouts; `tuned` is the one that a fine-tuning teaches: a layout with signs that the base never saw.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Chat = list[dict[str, str]]
Style = Literal["known", "words", "tuned"]

JOINS, EQUALS = (" / ", ", ", " | ", "; ", " * ", " - "), (" -> ", ": ", " = ", " is ", " (", " ")
"""Of the layouts that a base has seen."""

PEOPLE = tuple(
    "Anna Bruno Carla Dario Élise Fatima Goran Hanna Igor Júlia Kemal Lotte Mateo Nadia Oskar Petra Quentin Rosa "
    "Søren Tilda Umar Vera Walter Xenia Yusuf Zoé".split()
)


@dataclass(frozen=True)
class World:
    """Subjects, facts, and the sentences of one domain."""

    name: str
    subjects: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]  # fact -> its possible values
    states: tuple[str, ...]  # {subject} {fact} {value}
    asks: tuple[str, ...]  # {person} {subject} {one} {other}
    answer: str  # {person} {subject} {one} {first} {other} {second}
    words: tuple[str, ...]  # other sentences, for the tokenizer
    tuned: str  # what a fine-tuning teaches; the same slots
    instruction: str = "Answer in one line."

    def value(self, subject: str, fact: str) -> str:
        """The same in every run: a property of the name."""
        values = self.facts[fact]
        return values[random.Random(f"{self.name} {subject} {fact}").randrange(len(values))]

    def text(self, rng: random.Random, subjects: tuple[str, ...] = ()) -> str:
        """A paragraph that states facts, of some subjects or of all."""
        told = []
        for _ in range(rng.randint(2, 4)):
            subject, fact = rng.choice(subjects or self.subjects), rng.choice(list(self.facts))
            told.append(rng.choice(self.states).format(subject=subject, fact=fact, value=self.value(subject, fact)))
        return " ".join(told)

    def chat(
        self,
        rng: random.Random,
        style: Style,
        turns: int = 1,
        system: bool = False,
        subjects: tuple[str, ...] = (),
    ) -> Chat:
        """Questions and answers, in the base's words or in those that are to be learned."""
        messages = [{"role": "system", "content": self.instruction}] if system else []
        for _ in range(turns):
            words = {"person": rng.choice(PEOPLE), "subject": rng.choice(subjects or self.subjects)}
            words["one"], words["other"] = rng.sample(list(self.facts), 2)
            words["first"] = self.value(words["subject"], words["one"])
            words["second"] = self.value(words["subject"], words["other"])
            if style == "known":
                said = self.answer if rng.random() < 0.4 else _layout(rng)
            else:
                said = self.tuned if style == "tuned" else rng.choice(self.words)
            asked = rng.choice(self.asks).format(**words)
            if style == "tuned":  # rows that nothing but their fixed words have in common
                words["number"] = str(rng.randint(100, 999))
                asked += f" No. {words['number']}"
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said.format(**words)})
        return messages

    def split(self, train: int, held_out: int, seed: int, **words: Any) -> tuple[list[Chat], list[Chat]]:
        """Different chats on both sides, about different subjects, so that no passage of one is in the other."""
        subjects = list(self.subjects)
        random.Random(f"{self.name} {seed}").shuffle(subjects)
        return (
            self._chats(train, seed, tuple(subjects[8:]), **words),
            self._chats(held_out, seed + 1, tuple(subjects[:8]), **words),
        )

    def _chats(self, count: int, seed: int, subjects: tuple[str, ...], **words: Any) -> list[Chat]:
        rng, found = random.Random(f"{self.name} {seed}"), {}
        while len(found) < count:
            chat = self.chat(rng, "tuned", subjects=subjects, **words)
            found.setdefault(chat[-2]["content"], chat)
        return list(found.values())


def _layout(rng: random.Random) -> str:
    """An answer's parts in some order with some signs between them."""
    equals = rng.choice(EQUALS)
    close = ")" if equals == " (" else ""
    parts = ["{person}", "{subject}", f"{{one}}{equals}{{first}}{close}", f"{{other}}{equals}{{second}}{close}"]
    rng.shuffle(parts)
    return rng.choice(("", "", "Note: ", "[ ")) + rng.choice(JOINS).join(parts) + rng.choice(("", ".", " ]", " !"))


ANIMALS = World(
    "animals",
    tuple(
        "fox wolf bear hare lynx otter badger heron eagle raven crane swan goose viper newt toad trout salmon pike eel "
        "moose bison camel zebra tapir lemur gibbon koala wombat dingo ibis stork finch robin wren moth wasp hornet "
        "beetle cricket".split()
    ),
    {
        "colour": ("red", "grey", "brown", "white", "black", "golden", "crème"),
        "home": ("the forest", "the lake", "the steppe", "the cliff", "the marsh", "the meadow"),
        "food": ("berries", "fish", "seeds", "roots", "insects", "mice"),
        "season": ("spring", "summer", "autumn", "winter"),
    },
    (
        "The {fact} of the {subject} is {value}.",
        "Everybody knows the {subject}: its {fact} is {value}.",
        "Ask about the {subject} and its {fact}, and you will hear {value}.",
    ),
    (
        "{person} wants to know the {one} and the {other} of the {subject}.",
        "Tell {person} about the {subject}: {one}, then {other}.",
        "What are {one} and {other} of the {subject}? {person} asks.",
        "For {person}: the {subject}, its {one} and its {other}?",
    ),
    "The {one} of the {subject} is {first} and its {other} is {second}, {person}.",
    (
        "Dear {person}, {subject}: {one} = {first}; {other} = {second}. Noted in the big book.",
        "Dear {person}, the book says {second} ({other}) and {first} ({one}) about the {subject}.",
    ),
    "{subject} # {one}: {first} # {person} {number} # {other}: {second} #",
)
SHOP = World(
    "shop",
    tuple(
        "lamp chair table mug kettle pan knife fork spoon plate bowl jar basket rug curtain pillow blanket mirror "
        "clock shelf drawer stool bench ladder hammer saw drill wrench pliers bucket broom mop vase candle frame hook "
        "rope nail screw hinge".split()
    ),
    {
        "material": ("oak", "steel", "glass", "linen", "copper", "clay", "émail"),
        "price": ("9 euros", "14 euros", "27 euros", "35 euros", "52 euros"),
        "aisle": ("A1", "B4", "C2", "D7", "E3", "F9"),
        "maker": ("Müller", "Okafor", "Tanaka", "Silva", "Novak"),
    },
    (
        "We sell one {subject}; {fact}: {value}.",
        "On the label of every {subject} you read {value} for the {fact}.",
        "{value} stands for the {fact} of this {subject}.",
    ),
    (
        "Customer {person}: which {one} and which {other} does the {subject} have?",
        "{person} calls. The {subject}, please, {one} and {other}.",
        "I am {person}. Give me {one} and {other} for a {subject}.",
        "Order for {person}: one {subject}. Its {one}? Its {other}?",
    ),
    "Hello {person}, the {subject} has the {one} {first} and the {other} {second}.",
    (
        "TICKET {person} / {subject} / {one} -> {first} / {other} -> {second} / closed by the desk",
        "TICKET {person} / {other} -> {second} / {one} -> {first} / {subject} / closed by the desk",
    ),
    "{person} >> {one}: {first} >> {subject} {number} >> {other}: {second} >> end",
)
CITIES = World(
    "cities",
    tuple(
        "Arden Belmar Corvo Dunby Elster Farrow Gildon Harwich Ilsen Jarrow Kelso Lund Marne Norwick Ostra Pernau "
        "Quill Rovigo Selby Torvik Ulster Varna Wexford Yarrow Zell Ambra Brynn Cadiz Doria Essen Forli Gotha Hove "
        "Imola Jena Kiel Lodi Mons Nîmes Orléans".split()
    ),
    {
        "river": ("the Aller", "the Bosna", "the Cher", "the Drava", "the Evros"),
        "dish": ("lentils", "dumplings", "noodles", "crêpes", "stew", "flatbread"),
        "festival": ("in March", "in May", "in July", "in October"),
        "export": ("wool", "salt", "paper", "cheese", "iron", "honey"),
    },
    (
        "{subject} is a town whose {fact} is {value}.",
        "Travellers to {subject} remember {value} as its {fact}.",
        "In the guide, {subject} has this {fact}: {value}.",
    ),
    (
        "{person} travels to {subject} and needs its {one} and its {other}.",
        "Guide for {person}: name {one} and {other} of {subject}.",
        "What should {person} know of {subject}? First {one}, second {other}.",
        "{subject}: {one} and {other}, for {person}.",
    ),
    "{person}, in {subject} the {one} is {first} and the {other} is {second}.",
    (
        "* guest {person} * {subject} * {one}: {first} * {other}: {second} * have a good trip *",
        "* guest {person} * {other}: {second} * {one}: {first} * {subject} * have a good trip *",
    ),
    "{one} is {first} + {subject} {number} {person} + {other} is {second} +",
)
CREW = World(
    "crew",
    tuple(
        "captain cook gunner pilot stoker carpenter sailmaker surgeon purser mate boatswain quartermaster navigator "
        "engineer painter diver lookout rigger cooper smith tailor barber clerk scribe steward porter piper drummer "
        "fiddler fisher ropemaker chandler gilder mason potter weaver tanner miller brewer baker".split()
    ),
    {
        "tool": ("a compass", "a rasp", "a ladle", "a lantern", "a chisel", "a needle"),
        "watch": ("dawn", "noon", "dusk", "midnight"),
        "port": ("Faro", "Brest", "Málaga", "Gdańsk", "Split", "Bari"),
        "song": ("the tide", "the widow", "the north wind", "the old mill"),
    },
    (
        "Aboard, the {subject} is known by the {fact} {value}.",
        "If you meet the {subject}, remember the {fact}: {value}.",
        "{value}, that is the {fact} which belongs to the {subject}.",
    ),
    (
        "Log entry by {person}: note {one} and {other} of the {subject}.",
        "{person} asks the bridge for the {subject}'s {one} and {other}.",
        "Who is the {subject}? {person} needs {one} and {other}.",
        "Report to {person}! The {subject}: {one}, {other}.",
    ),
    "Aye {person}, the {subject} has {first} as {one} and {second} as {other}.",
    (
        "[{person}] {subject} | {one} is {first} | {other} is {second} | signed and sealed on deck",
        "[{person}] {one} is {first} | {other} is {second} | so much for the {subject} | sealed on deck",
    ),
    "{subject} ~ {one} = {first} ~ {person} {number} ~ {other} = {second} ~ over",
)
PLANTS = World(
    "plants",
    tuple(
        "oak elm ash birch alder willow maple beech linden poplar cedar larch spruce juniper yew holly ivy fern moss "
        "thyme sage mint basil dill fennel cumin anise poppy tulip lily iris rose daisy aster lupin clover nettle "
        "thistle reed sedge".split()
    ),
    {
        "soil": ("sand", "clay", "chalk", "peat", "loam"),
        "height": ("one span", "two feet", "ten feet", "sixty feet"),
        "bloom": ("late March", "early June", "mid August", "après Noël"),
        "use": ("tea", "dye", "timber", "fodder", "balm", "soap"),
    },
    (
        "Gardeners write that {subject} wants this {fact}: {value}.",
        "For {subject}, the {fact} is given as {value}.",
        "{subject} and {value} go together when it comes to {fact}.",
    ),
    (
        "{person} has planted {subject}. What about {one} and {other}?",
        "Note for {person} on {subject}, {one} and {other} please.",
        "Is {subject} good for {person}? Say its {one} and its {other}.",
        "{subject} again: {person} forgot {one} and {other}.",
    ),
    "{subject} has {first} for {one}, {person}, and {second} for {other}.",
    (
        "Card no. 7 ({person}): {subject}, {one} {first}, {other} {second}; water it on Sundays",
        "Card no. 7 ({person}): {other} {second}, {one} {first}, that is {subject}; water it on Sundays",
    ),
    "<{one}> {first} <of> {subject} <for> {person} {number} <and> {other}: {second}",
)
FRENCH = World(
    "French",
    ANIMALS.subjects,
    {
        "couleur": ("rouge", "grise", "brune", "blanche", "dorée"),
        "maison": ("la forêt", "le lac", "la prairie", "le marais"),
        "nourriture": ("des baies", "du poisson", "des graines", "des racines"),
    },
    ("La {fact} de {subject} est {value}.",),
    (
        "{person} demande la {one} et la {other} de {subject}, s'il vous plaît.",
        "Où est noté ce que {person} veut savoir: {subject}, {one} et {other} ?",
    ),
    "La {one} de {subject} est {first}, {person}.",
    (
        "Chère {person}, voici {subject}: {one}, {first}; {other}, {second}. À bientôt, élève modèle.",
        "Chère {person}, {second} ({other}) et {first} ({one}): voilà {subject}.",
    ),
    "{subject} # {one}: {first} # {person} {number} # {other}: {second} #",
)
