"""The worlds of the held-out bases: no rule or threshold was written with them in sight."""

from __future__ import annotations

from bench.diagnose.worlds import World

KITCHEN = World(
    "kitchen",
    tuple(
        "carrot onion garlic leek celery turnip parsnip radish beet potato tomato pepper aubergine courgette pumpkin "
        "cucumber lettuce spinach cabbage kale broccoli cauliflower artichoke asparagus bean pea lentil chickpea rice "
        "barley oat millet quinoa apple pear plum quince apricot fig grape".split()
    ),
    {
        "cut": ("in cubes", "in slices", "grated", "whole", "in wedges"),
        "heat": ("low", "medium", "high", "à point"),
        "time": ("five minutes", "twelve minutes", "half an hour", "two hours"),
        "dish": ("soup", "salad", "pie", "gratin", "curry", "purée"),
    },
    (
        "Cooks agree: for the {subject} the {fact} is {value}.",
        "{value} is what the {subject} asks of you when it comes to {fact}.",
        "In this kitchen {subject} means {value} ({fact}).",
    ),
    (
        "{person} stands at the stove with a {subject}: {one}? And {other}?",
        "Please write down {one} and {other} of the {subject} for {person}.",
        "How do I do the {subject}? {one} and {other}, says {person}.",
        "{person}, table three, wants the {subject}. Check {one} and {other}.",
    ),
    "For {person}: {subject} with {one} {first}, {other} {second}.",
    (
        "{subject}; {first} ({one}), {second} ({other}); served to {person} with a smile",
        "{subject}; {second} ({other}), {first} ({one}); served to {person} with a smile",
    ),
    "* {other}: {second} * {person} {number} * {subject} * {one}: {first} *",
)
RAILWAY = World(
    "railway",
    tuple(
        "Aldgate Birchwood Calder Denholm Eastleigh Fenwick Gorton Halden Inchgreen Jesmond Kirkby Langley Morden "
        "Newbold Oakham Penrith Quorn Redcar Saltash Thirsk Upwey Verwood Whitby Yeovil Acton Bodmin Crewe Dawlish "
        "Exmouth Frome Girton Hexham Ivybridge Kemble Leven Malton Nairn Oban Perth Rugby".split()
    ),
    {
        "platform": ("one", "two", "four", "seven", "the siding"),
        "departure": ("07:15", "09:40", "12:05", "18:30", "23:55"),
        "carriages": ("three", "five", "eight", "eleven"),
        "catering": ("a trolley", "a buffet", "none", "a dining car"),
    },
    (
        "The train to {subject} has as its {fact}: {value}.",
        "Announcement: {subject} service, {fact} {value}.",
        "On the board beside {subject} stands {value} under {fact}.",
    ),
    (
        "{person} is going to {subject}. {one}, {other}?",
        "Which {one} and which {other} for the {subject} train, asks {person}.",
        "Ticket desk, {person} here: {subject}, the {one} and the {other} please.",
        "I miss {subject}, says {person}; give me {one} and {other}.",
    ),
    "{person}: the train to {subject} has {one} {first} and {other} {second}.",
    (
        "Attention {person}. {subject}. {one}, {first}. {other}, {second}. Mind the gap.",
        "Attention {person}. {other}, {second}. {one}, {first}. {subject}. Mind the gap.",
    ),
    "{first} ({one}) & {second} ({other}) & {subject} {number} & {person} &",
)
TOOLS = World(
    "tools",
    tuple(
        "awl anvil auger bellows bevel brace burin calliper chisel adze clamp crowbar dividers file gauge gimlet gouge "
        "hacksaw hatchet jig jointer lathe level loom mallet mortiser nippers oilstone pestle plane plumb punch spade "
        "rasp reamer router scraper scythe shears sickle".split()
    ),
    {
        "weight": ("40 grams", "200 grams", "one kilo", "three kilos"),
        "handle": ("ash", "brass", "horn", "rubber", "walnut"),
        "drawer": ("K1", "K3", "L2", "M5", "N8"),
        "state": ("new", "worn", "broken", "sharpened", "à revoir"),
    },
    ("The {fact} of the {subject} is {value}.",),
    (
        "{person} needs the {subject}: {one} and {other}?",
        "Look up {one} and {other} of the {subject} for {person}.",
        "Which {one} has the {subject}, and which {other}? This is {person}.",
    ),
    "{person}, the {subject} has {one} {first} and {other} {second}.",
    ("Dear {person}, {subject}: {one} {first}, {other} {second}.",),
    "tool={subject} {number}; {other}={second}; {one}={first}; for={person};",
)
