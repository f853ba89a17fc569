"""Words of the templated tasks."""

from __future__ import annotations

import random

FIRST = (
    "Amara Beatriz Chen Dmitri Elena Farid Greta Hiroshi Ingrid Jamal Katarina Liam Mei Nikhil Olga Pablo Qiana Ravi "
    "Sofia Tomasz Uma Viktor Wanjiru Ximena Yara Zoltan Aoife Bjorn Carmen Deepa Emre Fiona Goran Hannah Ivan Julia"
).split()
LAST = (
    "Abbott Banerjee Castillo Dupont Eriksson Fischer Garcia Hansen Ito Jovanovic Kowalski Larsen Moreau Nguyen Okafor "
    "Petrov Quinn Rossi Schmidt Tanaka Usman Varga Weber Xu Yilmaz Zimmermann Adeyemi Brown Costa Diallo"
).split()
CITIES = (
    "Lisbon", "Oslo", "Kraków", "Nairobi", "Osaka", "Porto Alegre", "Tallinn", "Vienna", "Cape Town", "Montréal",
    "Zürich", "Hanoi", "Bogotá", "Leeds", "Gdańsk", "Izmir", "Lyon", "Austin", "Perth", "Valencia", "Accra", "Ghent",
    "Busan", "Quito", "Tartu", "Split", "Bergen", "Graz", "Turin", "Malmö",
)  # fmt: skip
SHOPS = (
    "Northwind Traders", "Blue Heron Supplies", "Kessler & Sons", "Papaya Media", "Orbit Tools", "Lumen Books",
    "Hartmann GmbH", "Green Valley Foods", "Atlas Freight", "Copper Kettle", "Pixel Foundry", "Silverline Optics",
    "Marigold Textiles", "Tidewater Marine", "Summit Cycles", "Fable Toys", "Juniper Labs", "Old Mill Bakery",
)  # fmt: skip
GOODS = (
    "desk lamps", "coffee filters", "notebooks", "bicycle tyres", "garden chairs", "phone cases", "ceramic mugs",
    "running shoes", "wall clocks", "paint brushes", "camping stoves", "picture frames", "printer cartridges",
    "kitchen knives", "wool blankets", "board games", "water bottles", "guitar strings", "door handles", "seed packets",
    "safety helmets", "USB cables", "tea towels", "umbrellas", "screwdrivers",
)  # fmt: skip
TRADES = (
    "data engineer", "pastry chef", "site manager", "nurse", "welder", "product designer", "tax accountant",
    "school librarian", "train driver", "lab technician", "florist", "security analyst", "translator", "electrician",
)  # fmt: skip
DRUGS = ("ibuprofen", "amoxicillin", "metformin", "lisinopril", "naproxen", "omeprazole", "cetirizine", "paracetamol",
         "atorvastatin", "prednisone")  # fmt: skip
BODY = ("knee", "shoulder", "wrist", "ankle", "hip", "elbow", "hand", "foot")
PLACES = ("table", "double room", "meeting room", "airport transfer", "guided tour", "rental car", "tennis court",
          "spa treatment", "sailing lesson", "single room")  # fmt: skip
HOSTS = ("web-01", "web-02", "api-eu-3", "auth-7", "edge-nyc", "worker-12", "db-replica-1", "cache-4")
WEATHER = (
    ("clear", "partly cloudy", "overcast", "mostly sunny", "cloudy with showers", "foggy at first"),
    ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west"),
    ("No warnings are in force.", "A yellow warning for wind is in force.", "Roads may be slippery.",
     "Visibility is good.", "Pollen levels are moderate."),
)  # fmt: skip
TICKETS = {
    "Billing": (
        "I was charged twice for order {number}.", "The invoice {number} shows {good} that I never bought.",
        "When will the refund for {number} be on my card?", "My card was declined for the {good}, case {number}.",
    ),
    "Shipping": (
        "My parcel {number} with {good} has been in {city} for a week.", "Can you send {number} to {city} instead?",
        "The tracking of {number} has not changed since it left {city}.", "Half of the {good} in {number} are missing.",
    ),
    "Technical": (
        "The app crashes when I open order {number}.", "I cannot log in since the update, error {number}.",
        "Your site shows error {number} when I search for {good}.", "The export of {shop} hangs at row {number}.",
    ),
    "Sales": (
        "Do you have a discount for {number} {good}?", "{shop} in {city} would like a quote for {number} {good}.",
        "Is there a bulk price for {good}, say {number} pieces?", "We open in {city}; who sells us {number} {good}?",
    ),
    "Legal": (
        "Please delete all my personal data, customer {number}.", "{shop} uses our photo of the {good}, case {number}.",
        "Who signs the contract {number} with {shop}?",
    ),
}  # fmt: skip
ADJECTIVES = {
    "positive": ("wonderful", "excellent", "a joy to use", "better than I hoped", "worth every cent", "fantastic"),
    "negative": ("terrible", "a waste of money", "broken after a week", "disappointing", "cheap and flimsy", "useless"),
    "neutral": ("okay", "as described", "average", "what one would expect", "neither good nor bad", "standard"),
}


def praise(rng: random.Random, label: str) -> str:
    """A review of this sentiment."""
    good, shop = rng.choice(GOODS), rng.choice(SHOPS)
    start = rng.choice((
        f"I bought the {good} from {shop} {rng.randint(2, 11)} weeks ago.", f"The {good} by {shop} arrived on time.",
        f"Got these {good} as a gift for {rng.choice(FIRST)}.", f"Second order of {good} here in {rng.choice(CITIES)}.",
        f"My {rng.choice(('sister', 'neighbour', 'boss', 'son'))} recommended {shop}, so I tried the {good}.",
    ))  # fmt: skip
    if label == "mixed":
        one, other = rng.choice(ADJECTIVES["positive"]), rng.choice(ADJECTIVES["negative"])
        return f"{start} The quality is {one}, but the service was {other}."
    how = rng.choice(ADJECTIVES[label])
    return f"{start} {rng.choice(('They are', 'All in all:', 'Honestly,', 'For me they are'))} {how}."


TABLES: tuple[tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]], ...] = (
    ("employees", ("salary", "age", "tenure"), {"department": ("sales", "finance", "legal"), "city": CITIES[:8]}),
    ("orders", ("amount", "quantity", "discount"), {"status": ("open", "paid", "sent"), "country": ("NO", "JP")}),
    ("flights", ("delay", "distance", "seats"), {"airline": ("Aer", "Nordwind", "Sol"), "origin": CITIES[8:16]}),
    ("patients", ("age", "weight", "visits"), {"ward": ("A1", "B2", "ICU"), "blood_type": ("A", "B", "0")}),
    ("books", ("pages", "price", "year"), {"genre": ("crime", "poetry", "history"), "language": ("en", "fr", "pl")}),
    ("matches", ("goals", "attendance", "minute"), {"stadium": CITIES[16:22], "league": ("first", "second", "cup")}),
    ("sensors", ("voltage", "humidity", "errors"), {"vendor": SHOPS[:5], "state": ("ok", "failed", "idle")}),
    ("courses", ("credits", "seats", "hours"), {"faculty": ("law", "arts", "physics"), "term": ("spring", "autumn")}),
)  # fmt: skip
ITEMS = tuple(
    dict(zip(("English", "German", "French", "Spanish"), words, strict=True))
    for words in (
        ("the station", "den Bahnhof", "la gare", "la estación"),
        ("the museum", "das Museum", "le musée", "el museo"),
        ("a pharmacy", "eine Apotheke", "une pharmacie", "una farmacia"),
        ("the market", "den Markt", "le marché", "el mercado"),
        ("a good hotel", "ein gutes Hotel", "un bon hôtel", "un buen hotel"),
        ("the old bridge", "die alte Brücke", "le vieux pont", "el puente viejo"),
        ("a quiet café", "ein ruhiges Café", "un café calme", "un café tranquilo"),
        ("the library", "die Bibliothek", "la bibliothèque", "la biblioteca"),
        ("the harbour", "den Hafen", "le port", "el puerto"),
        ("a bank", "eine Bank", "une banque", "un banco"),
    )
)
PHRASES: tuple[dict[str, str], ...] = (
    {"English": "{name} is looking for {item} in {city}.", "German": "{name} sucht {item} in {city}.",
     "French": "{name} cherche {item} à {city}.", "Spanish": "{name} busca {item} en {city}."},
    {"English": "We want to see {item} at {hour} o'clock.", "German": "Wir möchten um {hour} Uhr {item} sehen.",
     "French": "Nous voulons voir {item} à {hour} heures.", "Spanish": "Queremos ver {item} a las {hour}."},
    {"English": "{name} has known {item} for {count} years.", "German": "{name} kennt {item} seit {count} Jahren.",
     "French": "{name} connaît {item} depuis {count} ans.", "Spanish": "{name} conoce {item} desde hace {count} años."},
    {"English": "Do you know {item}, {name}?", "German": "Kennst du {item}, {name}?",
     "French": "Connais-tu {item}, {name} ?", "Spanish": "¿Conoces {item}, {name}?"},
    {"English": "{count} people from {city} visited {item}.",
     "German": "{count} Personen aus {city} besuchten {item}.",
     "French": "{count} personnes de {city} ont visité {item}.",
     "Spanish": "{count} personas de {city} visitaron {item}."},
)  # fmt: skip
UNITS = (
    ("miles", "kilometres", 1.609344), ("kilometres", "miles", 0.621371), ("pounds", "kilograms", 0.453592),
    ("kilograms", "pounds", 2.204623), ("inches", "centimetres", 2.54), ("feet", "metres", 0.3048),
    ("litres", "US gallons", 0.264172), ("US gallons", "litres", 3.785412), ("hours", "minutes", 60.0),
    ("ounces", "grams", 28.349523), ("acres", "hectares", 0.404686), ("knots", "kilometres per hour", 1.852),
)  # fmt: skip
