"""Make the demo's data: free-text messages to a shop, each with the strict JSON record that a ticket system wants.

    python examples/tickets.py [OUT]        # default: examples/tickets.jsonl beside this file

A row is ``{"messages": [system, user, assistant], "shop": "..."}``. The task looks easy but is hard for a small model:
one of five intents, plural to singular, "four" to 4, null for what the message does not say, urgency from wording,
exact spelling of codes and places never seen before.

**The split is by shop.** Every bank below (sentences, names, cities, product words) is dealt out like cards, so each
entry belongs to exactly one shop; only closed classes are shared: quantities, intents, JSON keys, the missing
greeting and the missing closing. Holding out a whole shop therefore holds out all of its sentences and entities, and a
good score there means the task was learned, not the rows. A random split of the rows would put every held-out
sentence into training as well, which is the most common reason for an evaluation that is too good.

The record follows from the text alone:

* ``qty`` is the number, a digit or a word, right before the item, and null if there is none;
* ``item`` is the singular; ``order`` and ``city`` are null when not mentioned; the customer's name is a decoy;
* ``urgent`` is true only when the closing says so.

Nothing here comes from a data set: the text was written for this file, and the same rows come out on every machine.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = "Extract JSON with keys intent, item, qty, order, city, urgent."
ROWS_PER_TEMPLATE = 4  # 5 intents x 3 templates x 4 = 60 rows a shop
SHOPS = "acorn birch clover dahlia elder fennel gorse hazel iris jasmine lupin maple".split()
# From two up, so that no sentence depends on the number ("is" or "are").
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]

# Placeholders: {n} number and item ("four red kettles"), {thing} and {things} the item without a number.
# Each intent has three kinds of sentence, twelve of a kind: a shop is dealt one of each kind.
TEMPLATES = {
    "buy": [
        # number and city, no order number
        "I want to buy {n} by card, please send the parcel to {city}.",
        "I would like to buy {n}, to be delivered to {city}.",
        "Could I buy {n} and have the parcel shipped to our flat in {city}?",
        "I wish to purchase {n}, going to a friend in {city}.",
        "We want to order {n} for our new office in {city}.",
        "Can I buy {n}, delivered to {city}, and what would it cost?",
        "I am placing a new order: {n}, to be shipped to {city}.",
        "My plan is to purchase {n} as a present for my sister in {city}.",
        "Our hotel in {city} would like to purchase {n}, kindly bill us.",
        "Our school in {city} wishes to buy {n} from your catalogue.",
        "I have decided to buy {n}; the box should go to {city}.",
        "I wish to buy {n}, please post the box to {city}.",
        # number only
        "I want to buy {n} from your website and pay by bank transfer.",
        "Please take my order for {n} and tell me the total price.",
        "I saw your spring offer and I would love to purchase {n}.",
        "Is it possible to order {n} by email? If yes, consider this my order.",
        "My club would like to buy {n}, please send us an invoice.",
        "We are moving house and want to order {n} from you.",
        "I'd be glad to buy {n}, provided that you have that many in stock.",
        "Do you still sell these? I am looking to buy {n}.",
        "I want to purchase {n}, I will collect and pay at the till.",
        "After reading the reviews I am ready to buy {n}.",
        "A colleague recommended you, so I wish to order {n}.",
        "Please reserve {n} for me, I mean to buy at the listed price.",
        # no number
        "I would like to buy some {things}, which sizes do you offer?",
        "We are interested in ordering {things} for the staff kitchen.",
        "Can I still order the {thing} from your winter catalogue?",
        "I want to purchase more {things} like those in your window.",
        "Please tell me how to pay, I mean to buy {things} online.",
        "My neighbour has your {thing} and now I want to buy the same.",
        "What do your {things} cost? I would like to place an order.",
        "I am hoping to buy the {thing} that you showed at the fair.",
        "Do you have {things} in stock? I'd like to buy some for my mother.",
        "Our café would like to purchase {things}, please accept this as an order.",
        "I plan to order {things} again, the quality was very good.",
        "I would like to buy the {thing} from page nine of your leaflet.",
    ],
    "cancel": [
        # number and order number
        "Please cancel order {order}, the {n} would not fit in our hall.",
        "I ordered {n} as {order} but changed my mind, kindly cancel that.",
        "Could you cancel order {order}? I no longer need the {n}.",
        "I must cancel {order} with the {n}, my wife bought the same elsewhere.",
        "The {n} in order {order} were a mistake of mine, please cancel.",
        "Do not ship {order}: I want to cancel the {n}.",
        "Please take {n} off your list and cancel {order} for me.",
        "Order {order} for {n} is to be cancelled, we found a cheaper offer.",
        "I wish to cancel {order}, so the {n} should not be sent.",
        "We have closed our shop and need to cancel {n}, order {order}.",
        "Please cancel {order}; it contains {n} that I clicked by accident.",
        "My son ordered {n} without asking me, please cancel {order}.",
        # item without a number, order number
        "Please cancel order {order}, I do not need the {thing} any more.",
        "I have changed my mind about the {things}, so cancel {order} and do not charge me.",
        "Kindly cancel {order} with my {things} before it leaves your warehouse.",
        "Order {order} was placed twice, please cancel the {thing}.",
        "I would like to cancel {order} because I chose the wrong {thing}.",
        "Our plans are different, so the {things} of {order} should be cancelled.",
        "Can {order} still be cancelled? I picked the {thing} by mistake.",
        "Please cancel and delete order {order}, I don't want the {things}.",
        "I have to cancel {order}, the {thing} costs more than I can pay.",
        "Do not send the {things}; I am cancelling {order}.",
        "We want to drop our purchase {order}, please confirm that the {thing} is cancelled.",
        "It was an error to order the {things}, please cancel {order}.",
        # item without a number, no order number
        "Please cancel the {things} that I ordered on your website.",
        "I don't want the {thing} any longer, kindly cancel my purchase.",
        "Could you cancel the delivery of my {things}? I changed my mind.",
        "I need to cancel the {thing}, it turned out to be the wrong colour.",
        "Stop and cancel my order of {things}, we bought them in town.",
        "My order for the {thing} should be cancelled before you pack it.",
        "We no longer need {things} in our office, so please cancel.",
        "I clicked too fast: my order of the {thing} must be cancelled.",
        "Please cancel my request for {things}, our budget was cut.",
        "Is it still possible to cancel the {things} I asked for on Sunday?",
        "Do not post the {thing} to me, I would like to cancel.",
        "I must cancel my order for {things}, my landlord has some already.",
    ],
    "refund": [
        # number and order number
        "Order {order} was a let-down: I want a refund for the {n}.",
        "I returned {n} from order {order} and would like my money back.",
        "Please refund {n}, order {order}, the colour is not as shown.",
        "The {n} of {order} came too late for the party, please pay me back.",
        "I am not happy with {n} from {order} and ask for a full refund.",
        "You charged me for {n} in {order} that I sent back, refund me please.",
        "Kindly return my money for {n}; the order number is {order}.",
        "We expected better quality than {n} in order {order}, so refund us.",
        "I demand a refund on {order}, because {n} fell apart.",
        "My card was billed twice for {n}, order {order}, I want the money back.",
        "Please reimburse me for {n} from {order}, I never opened the box.",
        "With {order} I got {n} of poor quality and expect a refund.",
        # item without a number, order number
        "I sent back the {thing} from order {order}, please refund me.",
        "The {things} in {order} smell odd and I would like my money back.",
        "Please give me a refund for my {thing}, bought with {order}.",
        "I'm disappointed by the {things} of {order}: kindly reimburse me.",
        "My {things} from {order} are too small, I want to be refunded.",
        "Where can I claim the money for the {thing} from order {order}?",
        "I paid too much for the {things} in order {order}, refund the difference.",
        "The {thing} I bought as {order} does not work and I ask for repayment.",
        "Could you pay back what I spent on {things}? The order was {order}.",
        "Order {order} is on its way back to you, so refund the {thing}.",
        "We are returning the {things} from {order} and want our money.",
        "The {thing}, order {order}, is useless to me, so refund it please.",
        # number, no order number
        "I would like a refund for {n} that I bought in your store.",
        "Please send my money back for {n}, I lost the receipt.",
        "I brought {n} back to your counter and still wait for the refund.",
        "The {n} I purchased in May were faulty, I want to be reimbursed.",
        "How do I get my money back for {n} from your summer sale?",
        "You promised to refund {n} on the phone, but nothing came.",
        "I am returning {n} unused, please give me my money back.",
        "It is my right to have {n} refunded within thirty days.",
        "We were overcharged for {n} and ask you to repay us.",
        "My daughter did not like {n}, so I want a full refund.",
        "Please repay the price of {n}, they don't match the photo.",
        "I regret buying {n} and hope that you will refund me.",
    ],
    "replace": [
        # number and order number
        "In order {order} I found {n} broken, please send replacements.",
        "Please exchange {n} from order {order}, the wrong size was packed.",
        "{order} arrived with {n} scratched; I want new ones instead.",
        "I'd like to swap {n} of {order} for ones without cracks.",
        "The courier damaged {n} in {order}, could you replace that?",
        "You packed {n} in the wrong shade for {order}, please exchange them.",
        "We unpacked {order} and {n} had dents, so we ask for a replacement.",
        "Could I have {n} from {order} replaced? There are stains all over.",
        "My parcel {order} held {n} with missing parts, send me fresh ones.",
        "Please replace {n}: order {order} was badly wrapped.",
        "I want an exchange for {n}, order number {order}, as the lids leak.",
        "Order {order} brought me {n} with holes, please swap for good ones.",
        # item without a number, order number
        "The {thing} from order {order} came cracked, please replace it.",
        "I need the {things} of {order} exchanged for a bigger size.",
        "Please swap the {thing} in {order}, the handle is loose.",
        "My {things} from {order} arrived bent and I would like new ones.",
        "Could you replace the {thing}? It came in pieces with order {order}.",
        "Order {order} had the wrong {things}, please exchange those.",
        "The {thing} that came with {order} is torn, I expect a replacement.",
        "I'm writing about {order}: the {things} leak and need replacing.",
        "The {thing} you sent me for {order} is dirty, I want a clean one instead.",
        "Kindly exchange the {things} in my parcel {order} for the right model.",
        "There are dents in the {thing} of {order}, please ship a replacement.",
        "Something broke off the {thing} from {order}, can it be replaced?",
        # number, no order number
        "I bought {n} at your stall and all have rust, please replace them.",
        "Please exchange {n} for the next size up, I kept the box.",
        "There is a flaw in {n} that I got from you, I want a swap.",
        "The post crushed {n} on the way, could you send new ones?",
        "I received {n} in the wrong pattern and would like an exchange.",
        "We need a replacement for {n}, since the seams came open.",
        "You delivered {n} with loose screws, kindly swap for sound ones.",
        "Last week {n} reached me chipped, can you replace them?",
        "I hope that you can replace {n}, the paint is peeling off.",
        "Could {n} be exchanged? What came is not what I had chosen.",
        "My grandmother got {n} from you with a defect and asks for a replacement.",
        "Please exchange {n} for undamaged ones, photos are attached.",
    ],
    "status": [
        # number and order number
        "Where is my order {order}? I am waiting for the {n}.",
        "Has {order} with {n} left your warehouse yet?",
        "I ordered {n} under {order} and wonder when the parcel will come.",
        "Please tell me the delivery date of {n}, order {order}.",
        "Can you check how far {order} has got? It contains {n}.",
        "There is no news on {order}, when will {n} reach me?",
        "I'd like to know whether {n} from order {order} were shipped.",
        "The tracking page for {order} is empty, so where are my {n}?",
        "Could you give me an update on {n}? The number is {order}.",
        "What is the state of {order}, my order for {n}?",
        "My purchase {order} of {n} has not arrived, please look where it is.",
        "I have waited for {order} so long; are the {n} on the way?",
        # item without a number, order number
        "What is the current status of my {thing}, order {order}?",
        "I can't find my parcel {order} with the {things}, do you know where it is?",
        "Please let me know when {order} is going to arrive, I miss my {thing}.",
        "Has anything happened with the {things} of {order} since I paid?",
        "Your site says that the {thing} in {order} is packed, has the van picked it up?",
        "How long will it take until the {things} from {order} get here?",
        "I have heard nothing about my {thing}, is {order} on its way?",
        "Could you look up {order} and tell me what happened to the {things}?",
        "Which carrier has the {thing} of {order}, and on what day should I be at home?",
        "I would like a tracking link for the {things} in order {order}.",
        "We were promised the {thing}, {order}, for Monday, where is it at present?",
        "Please check on the {things}, order {order}, the driver did not show up.",
        # item without a number, no order number
        "When will the {things} that I ordered be delivered?",
        "I'm still waiting for my {thing}, has it been sent?",
        "Do you know where my {things} are? The tracking link is dead.",
        "Please tell me on which day the {thing} is supposed to come.",
        "Could you check the progress of my {things}? I paid in March.",
        "Is the {thing} I bought from you on its way already?",
        "I have no tracking number for the {things}, when do they ship?",
        "My {thing} has been in transit for ages, where is it?",
        "Where are the {things} I asked you for at Easter?",
        "What is the delivery status of my {thing}? The courier knows nothing.",
        "How is the delivery of our {things} coming along?",
        "I wonder if the {thing} from my last purchase has left your depot.",
    ],
}
OPENERS = [
    # name and city
    "Hello! I'm {name}, a customer in {city}.",
    "Hi, my name is {name} and I live in {city}.",
    "Good morning, this is {name} writing from {city}.",
    "Dear team, {name} from {city} here.",
    "Greetings from {city}, I am {name}.",
    "Good evening, {name} speaking, I'm based in {city}.",
    "Hey there, it's {name} over in {city}.",
    "To whom it may concern: I am {name}, resident of {city}.",
    "Hi shop, you delivered to me in {city} before, my name's {name}.",
    "Good day! {name} is my name and I live in {city}.",
    "Hello again, {name} in {city} once more.",
    "Dear sir or madam, my name is {name}, of {city}.",
    # city only
    "Hello from {city}!",
    "I'm one of your customers in {city}.",
    "Good afternoon, I am writing from {city}.",
    "Hi, we live near the station in {city}.",
    "Warm regards from {city} to your team.",
    "We are a small family in {city}.",
    "Dear support, my home is in {city}.",
    "I have an account with you, registered in {city}.",
    "Hey, a client from {city} here.",
    "My delivery address is in {city}.",
    "Writing to you out of {city}.",
    "I run a bakery in {city}.",
    # name only
    "Hi, {name} here.",
    "Hello, my name is {name}.",
    "Good morning! This is {name}.",
    "Dear shop, I am {name}, an old customer.",
    "It's {name} again.",
    "Hey, I'm {name} and new to your shop.",
    "Good evening, you can call me {name}.",
    "My account is under the name {name}.",
    "{name} writing, we spoke on the phone.",
    "Hello team, {name} is contacting you.",
    "Hi there, I go by {name}.",
    "Dear all, it is me, {name}.",
    # neither
    "Hello!",
    "Good morning.",
    "Dear customer service!",
    "Hi everyone!",
    "Good day to you.",
    "Hey!",
    "Greetings.",
    "Dear helpdesk!",
    "Good afternoon!",
    "Hi folks!",
    "Hello, I hope you are well.",
    "Sorry to bother you.",
]
URGENT = [
    "This is urgent.",
    "Please hurry.",
    "I need an answer today.",
    "Please act at once.",
    "Please reply as soon as possible.",
    "It is very urgent for me.",
    "Do this right away, please.",
    "Be quick, it is urgent.",
    "I need this sorted immediately.",
    "Please treat it as an urgent case.",
    "Please hurry up with this.",
    "As soon as possible, please.",
    "Be fast, it's urgent.",
    "Please respond immediately.",
    "I am in a great hurry.",
    "Urgent, top priority!",
    "Please handle it at once.",
    "I need your answer as soon as possible.",
    "Quickly, please, it is urgent.",
    "It's an urgent request.",
    "I need it today.",
    "Let me know immediately, please.",
    "Urgent! Please call me back today.",
    "The deadline is today, so hurry.",
    "It has to happen right away.",
    "It must be done today.",
    "Please make it your most urgent case.",
    "I have to know at once.",
    "An immediate reply would be vital.",
    "We are in a hurry.",
    "Please see to it right away.",
    "This is a very urgent matter.",
    "I expect an answer today.",
    "Please do it as soon as you can.",
    "As quickly as possible, please.",
    "Urgently waiting for your answer.",
]
CALM = [
    "It is not urgent.",
    "There is no hurry.",
    "Take your time.",
    "No rush at all.",
    "This is not urgent for me.",
    "I am in no hurry.",
    "Please take all the time you need.",
    "There is no rush.",
    "My request is not urgent.",
    "You need not hurry.",
    "Feel free to take your time.",
    "No need to rush.",
    "No hurry on my side.",
    "Take as much time as you like.",
    "I am not in a rush.",
    "The matter is not urgent.",
    "We are in no hurry here.",
    "Just take your time, please.",
    "Please do not rush.",
    "It is by no means urgent.",
    "There's really no hurry.",
    "You can take your time.",
    "This is no urgent matter.",
    "We need not rush this.",
]
NAMES = """
Viktor Amelia Rashid Ingrid Tomasz Beatriz Oscar Yuki Priya Callum Greta Mateo Leila Henrik Sofia Dmitri Aisha Pablo
Freya Kenji Rosa Anton Mina Gareth Elif Lukas Chiara Omar Heidi Stefan Nadia Patrick Zoe Bruno Carmen Eero Fatima Hugo
Ivana Jonas Katrin Liam Marta Niko Olga Pedro Quinn Renata Samir Tessa Umberto Vera Wanda Xavier Yusuf Zelda Agnes
Boris Clara Dorian Emma Felix Gloria Hannes Irene Jasper Kirsten Leon Miriam Nils Odette Ruben
""".split()
# Byte-pair tokenizers split a word by what surrounds it. A city, a code or an adjective stands behind a space in the
# message and behind a quotation mark in the record (" Bergen" is Berg|en, but "Bergen is B|erg|en); a plural may share
# no token with its singular (k|ett|les, kettle). A small model misspells such words for its first few hundred rows, so
# they were left out: a short demo should be about the task and not about spelling.
CITIES = """
Porto Utrecht Gdansk Turin Ghent Aarhus Tampere Verona Malaga Nantes Linz Antwerp Rostock Toulouse Palermo Stavanger
Salzburg Valencia Trieste Bruges Hanover Galway Lausanne Bremen Oxford Rennes Aalborg Graz Genoa Leuven Kassel
Bordeaux Trondheim Catania Mainz Limoges Parma Delft Annecy Lucerne Reims Pisa Perugia Braga Coimbra Sligo Lincoln
Vigo London Paris Rome Norwich Cambridge Boston Chicago Ipswich Luton Bolton Stockport Taunton
""".split()
ORDER_PREFIXES = """
AB AK AM CH CL CR DA DF DL EL EM FC FR GB GL HD HR HT KS LC LM LT MC MD ML NC NR PL PR RB RM SC SK SP TR VM
""".split()
ADJECTIVES = """
red blue green yellow purple orange black white grey brown beige large small tiny round square wide tall short heavy
plain solar foldable classic modern simple deluxe oval electric thick thin soft bright dark magnetic washable quiet
emerald maroon lilac amber teal flat smooth rough long deep mini smart strong solid printed warm cool digital
double lime rose tan clear
""".split()
ITEMS = """
teapot, wall calendar, desk lamp, notebook, picture frame, candle holder, blanket, bath towel, paint brush,
lunch box, travel diary, wine glass, wrist watch, fruit bowl, coffee mug, garden chair, bird feeder, bike bell,
alarm clock, door mat, flower pot, shower curtain, sewing kit, tool belt, camping stove, sleeping bag,
water bottle, yoga block, jump rope, board game, jigsaw puzzle, toy train, teddy bear, music stand,
guitar strap, phone case, laptop sleeve, key ring, wallet, suitcase, rain jacket, straw hat, pillow,
rolling pin, salad spinner, pepper mill, bread basket, ice tray, soup ladle, cheese grater, spice rack,
storage crate, coat hook, hand mirror, soap dish, letter opener, pencil sharpener, fountain pen, lantern,
hammock, tripod, skateboard, helmet, fishing rod, tennis racket, golf glove, swim cap, pizza cutter, saucepan,
tea strainer, gravy boat, napkin, coaster, cookie jar, cocktail shaker, spirit level, nail file, glue gun,
extension cable, doorbell, mailbox, watering can, printer cartridge, keyboard, monitor arm, speaker, radio,
power bank, memory card, calculator, ruler, envelope, sketchbook, stamp album, camera, microphone, bracelet,
handbag, sweater, bucket, carpet, magnet, cabinet, mattress, bench, sponge, tablet, scanner
""".split(",")
KEYS = ("intent", "item", "qty", "order", "city", "urgent")


@dataclass
class Bank:
    """What one shop alone may say and sell; ``entries`` are what two shops must never have in common."""

    templates: dict[str, list[str]]
    openers: list[str]
    urgent: list[str]
    calm: list[str]
    names: list[str]
    cities: list[str]
    adjectives: list[str]
    items: list[str]
    prefixes: list[str]
    used_numbers: set[int] = field(default_factory=set)

    def entries(self) -> set[str]:
        sentences = [*self.openers, *self.urgent, *self.calm]
        for templates in self.templates.values():
            sentences += templates
        item_words = [word for item in self.items for word in item.split()]
        return {*sentences, *self.names, *self.cities, *self.adjectives, *item_words, *self.prefixes}


def plural(item: str) -> str:
    """English plural of the items above ("lunch box" -> "lunch boxes", "travel diary" -> "travel diaries")."""
    if re.search(r"(s|x|ch|sh)$", item):
        return item + "es"
    if re.search(r"[^aeiou]y$", item):
        return item[:-1] + "ies"
    return item + "s"


def deal(number: int) -> Bank:
    """Every twelfth card of each bank, from ``number`` on. The banks list twelve of a kind, so kinds are even."""

    def hand(bank: list[str]) -> list[str]:
        return bank[number :: len(SHOPS)]

    return Bank(
        templates={intent: hand(templates) for intent, templates in TEMPLATES.items()},
        openers=hand(OPENERS),
        urgent=hand(URGENT),
        calm=hand(CALM),
        names=hand(NAMES),
        cities=hand(CITIES),
        adjectives=hand(ADJECTIVES),
        items=[" ".join(item.split()) for item in hand(ITEMS)],
        prefixes=hand(ORDER_PREFIXES),
    )


def write_row(rng: random.Random, shop: str, bank: Bank, intent: str, template: str, urgency: str) -> dict:
    """One message and its record, both from the same choices."""
    count = rng.randint(2, len(NUMBERS) + 1)
    item = f"{rng.choice(bank.adjectives)} {rng.choice(bank.items)}"
    number = rng.choice([n for n in range(1000, 10000) if n not in bank.used_numbers])
    bank.used_numbers.add(number)
    order, city = f"{rng.choice(bank.prefixes)}-{number}", rng.choice(bank.cities)

    openers = ["", *bank.openers]
    if "{city}" in template:  # one city a message, or the record would be a matter of taste
        openers = [opener for opener in openers if "{city}" not in opener]
    opener = rng.choice(openers)
    closer = {"urgent": rng.choice(bank.urgent), "calm": rng.choice(bank.calm), "": ""}[urgency]

    text = " ".join(part for part in (opener, template, closer) if part)
    quantity = rng.choice([str(count), NUMBERS[count - 2]])
    message = text.format(
        n=f"{quantity} {plural(item)}",
        thing=item,
        things=plural(item),
        order=order,
        city=city,
        name=rng.choice(bank.names),
    )
    record = {
        "intent": intent,
        "item": item,
        "qty": count if "{n}" in text else None,
        "order": order if "{order}" in text else None,
        "city": city if "{city}" in text else None,
        "urgent": urgency == "urgent",
    }
    contents = (SYSTEM, message, json.dumps(record, separators=(",", ":")))
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)], "shop": shop}


def make_rows() -> list[dict]:
    """All rows, shop by shop, shuffled within a shop; checks that no two shops share an entry or two rows a message."""
    rng = random.Random(20)
    banks = {shop: deal(number) for number, shop in enumerate(SHOPS)}
    owners: dict[str, list[str]] = defaultdict(list)
    for shop, bank in banks.items():
        for entry in bank.entries():
            owners[entry].append(shop)
    shared = {entry: shops for entry, shops in owners.items() if len(shops) > 1}
    assert not shared, f"entries that several shops have: {shared}"

    rows = []
    for shop, bank in banks.items():
        shop_rows = []
        for intent, templates in bank.templates.items():
            urgencies = ["urgent"] * 5 + ["calm"] * 4 + [""] * 3
            rng.shuffle(urgencies)
            for template in templates:
                for _ in range(ROWS_PER_TEMPLATE):
                    shop_rows.append(write_row(rng, shop, bank, intent, template, urgencies.pop()))
        rng.shuffle(shop_rows)
        rows += shop_rows
    messages = {row["messages"][1]["content"] for row in rows}
    assert len(messages) == len(rows), "two rows have the same message"
    return rows


def main(out: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows()]
    out.write_text("".join(lines), encoding="utf-8", newline="\n")
    print(f"{out}: {len(lines)} rows of {len(SHOPS)} shops")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".jsonl"))
