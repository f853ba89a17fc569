"""Words that the texts, chats and tasks of this set are made of."""

from __future__ import annotations

NAMES = tuple(
    "Amara Bilal Chloé Dmitri Elena Farid Greta Hiroshi Ines Jonas Kavya Liam Mina Noor Oluwa Pilar Rania Sven Tomás "
    "Ursula Viktor Wanda Ximena Yara Zeno Aldo Britt Cyrus Dalia Emil".split()
)
CITIES = tuple(
    "Oslo Lima Porto Graz Kyoto Accra Lyon Quito Turin Basel Dakar Ghent Malmö Perth Riga Seoul Tunis Utrecht Vaasa "
    "Zagreb".split()
)
ITEMS = tuple(
    "lamp kettle desk chair bicycle camera tent jacket rucksack printer monitor heater blender mirror carpet clock "
    "guitar helmet ladder mattress oven pillow radio scarf shelf speaker table toaster umbrella vase".split()
)
QUALITIES = tuple("red blue heavy light old new small large cheap solid quiet bright soft broken clean rare".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)  # fmt: skip
OCCASIONS = tuple(
    "Lunch Dinner Review Interview Rehearsal Workshop Checkup Meeting Tour Lesson Walk Training".split()
)  # fmt: skip
ACTIONS = tuple("buys sells repairs carries finds loses paints cleans borrows returns wants sends".split())
DONE = tuple("bought sold repaired carried found lost painted cleaned borrowed returned wanted sent".split())
TABLES = {
    "orders": ("customer", "city", "month", "amount"),
    "staff": ("name", "city", "salary", "level"),
    "trips": ("driver", "city", "distance", "month"),
    "stock": ("item", "city", "count", "price"),
    "visits": ("guest", "month", "nights", "city"),
}
GOOD = (
    "It works every day.", "I would buy it again.", "My sister loves it.", "The colour is lovely.",
    "It came one day early.", "It is worth the money.", "It feels solid.", "The service was kind.",
    "It is so quiet that I forget it.", "Setting it up took a minute.",
)  # fmt: skip
BAD = (
    "It broke after a week.", "I want my money back.", "The colour is wrong.", "It came two weeks late.",
    "Nobody answers my letters.", "It smells of glue.", "It is louder than a train.", "One part was missing.",
    "It fell apart in the rain.", "The box was already open.",
)  # fmt: skip
SO_SO = (
    "It is neither good nor bad.", "It does what the box says.", "Others are about the same.",
    "I have seen better and worse.", "It is fine for the price.", "I use it now and then.",
)  # fmt: skip
_MADE = (
    "lumo ketar dorit sela vikro kamun tendi jakol rusak printu monar hetro blem mirra karpo klokka gitto helmu "
    "ladra matris ovna pillo radu skarra shelv spika tabul tostra umbri vasso rudo blavi grevo ligta vetro nuvo "
    "petto grando barato solda quieto brillo molla rotto limpa raro kompra venda ripara porta trova perda pinta "
    "netta presta torna vola manda"
).split()
CONLANG: dict[str, str] = dict(zip((*ITEMS, *QUALITIES, *ACTIONS), _MADE, strict=True))
UNITS = (
    ("km", "m", 1000), ("kg", "g", 1000), ("m", "cm", 100), ("l", "ml", 1000), ("h", "min", 60), ("min", "s", 60),
    ("cm", "mm", 10), ("t", "kg", 1000),
)  # fmt: skip
CHINESE = {
    "place": ("图书馆", "医院", "超市", "银行", "公园", "学校", "餐厅", "车站", "书店", "剧院"),
    "city": ("北京", "上海", "广州", "成都", "南京", "西安", "武汉", "苏州"),
    "day": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
}
GERMAN_PLACES = {
    "die Bücherei": "Bücherei", "das Schwimmbad": "Schwimmbad", "die Werkstatt": "Werkstatt", "das Rathaus": "Rathaus",
    "die Apotheke": "Apotheke", "der Zoo": "Zoo", "das Museum": "Museum", "die Bäckerei": "Bäckerei",
}  # fmt: skip
GERMAN_DAYS = tuple("Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split())
FRENCH_TRAINS = ("le train", "le bus", "le bateau", "l'avion", "le tramway")
EMOJI = ("🙂", "🚀", "🌧️", "👩‍🔧", "🎉", "🍲", "📦", "❤️")
