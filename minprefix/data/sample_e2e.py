"""
A small artificial dataset in the format of E2E, for a first run without the data and without a network.

An E2E row is a meaning representation ("mr": slots of a venue) and a description written by a crowd worker. These rows
have the same format, but the grammar, venues and places below were written for this project: no sentence and no name
is from E2E. Everything is drawn with random.Random(seed).random(), whose values are the same in every Python version,
so the rows are always the same.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

KEEP = {
    "eatType": 0.8,
    "food": 0.75,
    "priceRange": 0.6,
    "customer rating": 0.6,
    "area": 0.5,
    "familyFriendly": 0.5,
    "near": 0.5,
}  # the probability that an mr has the slot; after the name, in E2E's order

# ---------------------------------------------------------------------------------------------------------------------
# names: dev and test get venues (and some neighbours) that train never mentions

ADJECTIVES = (
    "Copper Crooked Velvet Painted Sleepy Lucky Hidden Ivory Scarlet Rusty Merry Quiet Amber Wandering Gilded Dancing"
).split()
NOUNS = (
    "Kettle Lantern Heron Thistle Otter Compass Spoon Magpie Ladder Fiddle Acorn Hare Button Pear Weathercock Marigold"
).split()
OWNERS = "Hattie Osgood Marlow Delphine Rafferty Imogen Barnaby Winifred Ludo Tabitha Fergus Odette".split()
ROOMS = "Table Larder Corner Parlour Hearth".split()
STEMS = "Bel Cor Tam Lor Vesp Zar Mir Sav".split()
ENDINGS = "anto issa ovina ello arola uno".split()
LANDMARKS = (
    "Ashgrove Linden Fernhill Marlbrook Oakhurst Penrose Wexley Thornbury Larkfield Coldwater Brackley Hollin"
).split()
SITES = "Park|Station|Hall|Bridge|Square|Gardens|Market".split("|")
HOUSES = "Theatre|Hotel|Museum|Library".split("|")  # these take an article

NAMES = [f"The {a} {n}" for a in ADJECTIVES for n in NOUNS]
NAMES += [f"{o}'s {r}" for o in OWNERS for r in ROOMS]
NAMES += [s + e for s in STEMS for e in ENDINGS] + [f"Casa {s + e}" for s in STEMS[::2] for e in ENDINGS]
NEARS = [f"{m} {s}" for m in LANDMARKS for s in SITES] + [f"The {m} {h}" for m in LANDMARKS for h in HOUSES]

# ---------------------------------------------------------------------------------------------------------------------
# wordings: (slot, value) -> sign, adjectives, phrases after the noun, verb phrases, clauses. {} is the value.
# The sign is 1 for an advantage of the venue and -1 for a disadvantage: opposite ones are joined by "but".

ADJECTIVE, PHRASE, VERB, CLAUSE = 1, 2, 3, 4
Wording = tuple[Any, ...]  # the sign, then texts
DETAILS = ("food", "priceRange", "customer rating", "familyFriendly")
FOOD = (
    0,
    "{}",
    "serving {} food|offering {} dishes",
    "serves {} food|offers {} dishes|has {} food on its menu|cooks {} food",
    "the food is {}|the menu is {}|the cooking is {}",
)
SUM = (
    0,
    "",
    "with prices of {}|charging {}",
    "charges {}|has prices of {}|is priced at {}",
    "prices are {}|you will pay {}",
)
SCORE = (
    "",
    "with a customer score of {}|rated {} by its customers",
    "is rated {} by its customers|scores {} with its customers|has a customer score of {}",
    "customers give it {}|customers rate it {}|the rating from customers is {}",
)
WHERE: Wording = (0, "", " {}", "is located {}|can be found {}|lies {}", "you will find the place {}|the place is {}")
WORDINGS: dict[tuple[str, str], Wording] = {
    ("priceRange", "cheap"): (
        1,
        "cheap|inexpensive|low-priced|affordable",
        "with low prices",
        "is cheap|has low prices|is easy on the wallet|keeps its prices low",
        "prices are low|it does not cost much",
    ),
    ("priceRange", "moderate"): (
        0,
        "mid-priced|mid-range",
        "with moderate prices",
        "sits in the middle price range|has moderate prices|keeps its prices moderate",
        "prices are moderate|it is mid-priced",
    ),
    ("priceRange", "high"): (
        -1,
        "expensive|high-priced|pricey",
        "with high prices",
        "is expensive|has high prices|is on the pricey side",
        "prices are high|it costs a lot",
    ),
    ("customer rating", "low"): (
        -1,
        "poorly rated|low-rated",
        "with poor customer ratings|rated poorly by its customers",
        "gets poor ratings from its customers|is rated poorly by its customers|gets low marks from its customers",
        "customers rate it poorly|the rating from customers is low",
    ),
    ("customer rating", "average"): (
        0,
        "",
        "with average customer ratings|rated average by its customers",
        "gets average ratings from its customers|is rated average by its customers|gets average marks from customers",
        "customers rate it as average|the rating from customers is average",
    ),
    ("customer rating", "high"): (
        1,
        "highly rated|well-rated",
        "with high customer ratings|rated highly by its customers",
        "gets high ratings from its customers|scores highly with its customers|gets high marks from its customers",
        "customers rate it highly|the rating from customers is high",
    ),
    ("familyFriendly", "yes"): (
        1,
        "child-friendly|family-oriented",
        "for the whole family|that welcomes children",
        "is good for families|welcomes families|is suitable for children|caters for children",
        "children are welcome|families are welcome|you can bring the children",
    ),
    ("familyFriendly", "no"): (
        -1,
        "",
        "for adults|that is not meant for children",
        "is no place for families|is unsuitable for children|does not suit families|is not meant for children",
        "children are not catered for|it is not a place for children|families are not catered for",
    ),
}
FOODS = "Thai Greek Mexican Spanish Turkish Lebanese Korean Austrian Egyptian Ethiopian Moroccan vegetarian".split()
WORDINGS.update({("food", food): FOOD for food in FOODS})
WORDINGS.update({("priceRange", price): SUM for price in ("less than £15", "£15-25", "more than £25")})
WORDINGS.update({("customer rating", f"{n} out of 10"): ((n > 6) - (n < 5), *SCORE) for n in (3, 4, 5, 6, 8, 9)})
AREAS = {
    "town centre": "in the town centre|in the centre of town",
    "canalside": "by the canal|on the canalside",
    "old town": "in the old town|in the old part of town",
    "harbour": "by the harbour|at the harbour",
    "suburbs": "in the suburbs|out in the suburbs",
}
VALUES = {"eatType": ["pub", "restaurant", "bistro", "tea room", "wine bar"], "area": list(AREAS)}
VALUES.update({slot: [value for s, value in WORDINGS if s == slot] for slot in DETAILS})

# Openings of a description, and the slot (or slot=value) that the opening states itself. {np}: "a cheap Thai pub" or
# "a pub with low prices"; {at}: the location, if it is stated here; {verb}: one more slot; {front}: the rating.
PLANS = (
    ("{name} is {np}{at}", ""),
    ("{name} is the name of {np}{at}", ""),
    ("there is {np} called {name}{at}", ""),
    ("{name}, {np}{at}, {verb}", ""),
    ("{np}{at}, {name} {verb}", ""),
    ("{where}, you will find {name}, {np}", "where"),
    ("{where} is {name}, {np}", "where"),
    ("located {where}, {name} is {np}", "where"),
    ("{where} there is {np} called {name}", "where"),
    ("you can eat {food} food at {name}, {np}{at}", "food"),
    ("for {food} food there is {name}, {np}{at}", "food"),
    ("if you are looking for {food} food, there is {name}, {np}{at}", "food"),
    ("{front}, {name} is {np}{at}", "customer rating"),
    ("children are welcome at {name}, {np}{at}", "familyFriendly=yes"),
    ("you can bring the children to {name}, {np}{at}", "familyFriendly=yes"),
    ("unsuitable for children, {name} is {np}{at}", "familyFriendly=no"),
)


def pick(options: str | Sequence[str], rng: random.Random) -> str:
    """A random element of a list, or of a string's parts separated by "|"."""
    options = options.split("|") if isinstance(options, str) else options
    return options[int(rng.random() * len(options))]


def shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    """The items in a random order. (random.shuffle may give another order in another Python version.)"""
    return sorted(items, key=lambda _: rng.random())


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def word(slot: str, slots: dict[str, str], kind: int, rng: random.Random) -> str:
    """A random wording of a slot, of the kind ADJECTIVE, PHRASE, VERB or CLAUSE; "" if it has none of this kind."""
    return pick(WORDINGS.get((slot, slots[slot]), WHERE)[kind], rng).format(slots[slot])


def join_phrases(parts: list[str], texts: list[str], slots: dict[str, str], comma: str = "") -> str:
    """ "a", "a and b" or "a, b and c"; "but" between two slots of opposite sign."""
    signs = [WORDINGS.get((slot, slots[slot]), WHERE)[0] for slot in parts]
    last = f"{comma} but" if len(texts) == 2 and signs[0] * signs[1] < 0 else " and"
    return f"{', '.join(texts[:-1])}{last} {texts[-1]}" if len(texts) > 1 else texts[0]


def location(slots: dict[str, str], rng: random.Random) -> str:
    """The location of the venue: "near X", "in the suburbs" or both in either order; "" if the mr has none."""
    parts = [f"{pick('near|close to|not far from', rng)} {slots['near']}"] if "near" in slots else []
    parts += [pick(AREAS[slots["area"]], rng)] if "area" in slots else []
    return " ".join(shuffled(parts, rng))


def fits(plan: tuple[str, str], slots: dict[str, str]) -> bool:
    """Whether the mr has the slot that the plan states, and enough other slots to fill the plan."""
    template, topic = plan
    slot, _, value = topic.partition("=")
    located = "area" in slots or "near" in slots
    details = sum(slot in slots for slot in DETAILS)
    if "{verb}" in template:
        return details > 0 and details + located > 1
    if "{front}" in template and len(slots) < 4:  # not "With a customer score of 5 out of 10, Corello is a pub."
        return False
    return located if slot == "where" else not slot or slot in slots and value in ("", slots[slot])


def describe(slots: dict[str, str], plan: tuple[str, str], rng: random.Random) -> str:
    """A description of the mr with the opening `plan` that states every slot once, and nothing else."""
    template, topic = plan
    where = location(slots, rng)
    slots = {**slots, "where": where}
    left = shuffled([slot for slot in DETAILS if slot in slots and slot != topic.partition("=")[0]], rng)
    verb = word(left.pop(), slots, VERB, rng) if "{verb}" in template else ""
    front = word("customer rating", slots, PHRASE, rng) if "{front}" in template else ""
    at = f" {where}" if where and topic != "where" and rng.random() < 0.75 else ""

    # the noun phrase: up to two adjectives, the food, the type of venue, a phrase; used slots are removed from `left`
    called = "called" in template  # the name follows the noun: not "pub serving Thai food called Corello"
    noun = slots.get("eatType") or pick("place|spot|venue", rng)
    used = [slot for slot in left if slot != "food" and word(slot, slots, ADJECTIVE, rng) and rng.random() < 0.4][:2]
    words = [join_phrases(used, [word(slot, slots, ADJECTIVE, rng) for slot in used], slots)] if used else []
    if "food" in left and (called or rng.random() < 0.5):
        used, words = used + ["food"], words + [slots["food"]]
    left = [slot for slot in left if slot not in used]
    words.append(noun)
    if left and not called and (words == [noun] and not at or rng.random() < 0.4):
        words.append(word(left.pop(), slots, PHRASE, rng))
    np = ("an " if words[0][0] in "aeioAEIO" else "a ") + " ".join(words)

    if where and topic != "where" and not at:
        left.append("where")
    opening = template.format(**slots, np=np, at=at, verb=verb, front=front)
    return capital(opening) + "." + follow_up(left, slots, rng)


def follow_up(left: list[str], slots: dict[str, str], rng: random.Random) -> str:
    """The rest of a description: the remaining slots in up to two sentences, one of verb phrases, one of clauses."""
    cut = len(left) if len(left) < 3 or len(left) == 3 and rng.random() < 0.4 else (len(left) + 1) // 2
    text = ""
    kind = VERB if cut > 2 or rng.random() < 0.6 else CLAUSE
    for part in (left[:cut], left[cut:]):
        if part:
            texts = [word(slot, slots, kind, rng) for slot in part]
            first = [t.split(" ", 1)[0] for t in texts]
            if kind == VERB and len(set(first)) == 1:  # "is cheap and is ..." -> "is cheap and ..."
                texts = texts[:1] + [t.split(" ", 1)[1] for t in texts[1:]]
            subject = pick(["it", "the " + slots.get("eatType", "place")], rng) + " " if kind == VERB else ""
            text += " " + capital(subject + join_phrases(part, texts, slots, "," if kind == CLAUSE else "")) + "."
        kind = VERB + CLAUSE - kind
    return text


def draw_mr(name: str, nears: list[str], rng: random.Random) -> dict[str, str]:
    """The slots of a random mr: the name and at least two others."""
    slots: dict[str, str] = {}
    while len(slots) < 2:
        kept = [slot for slot in KEEP if rng.random() < KEEP[slot]]
        slots = {slot: pick(nears if slot == "near" else VALUES[slot], rng) for slot in kept}
    return {"name": name, **slots}


def sample_rows(split: str) -> list[tuple[str, str]]:
    """The (mr, reference) rows of "train", "dev" or "test"; the references of an mr are in consecutive rows."""
    rng = random.Random(2021)
    names, nears = shuffled(NAMES, rng), shuffled(NEARS, rng)
    first, last, n_mrs, seed = {"train": (80, None, 1000, 1), "dev": (0, 40, 84, 2), "test": (40, 80, 84, 3)}[split]
    names, nears = names[first:last], nears[:96] if split == "train" else nears[72:]
    rng = random.Random(seed)
    rows: list[tuple[str, str]] = []
    seen: set[str] = set()
    while len(seen) < n_mrs:
        slots = draw_mr(pick(names, rng), nears, rng)
        mr = ", ".join(f"{slot}[{value}]" for slot, value in slots.items())
        if mr in seen:
            continue
        seen.add(mr)
        n_references = int(rng.random() * 3) + 1 if split == "train" else 3
        plans = shuffled([plan for plan in PLANS if fits(plan, slots)], rng)
        rows += [(mr, describe(slots, plan, rng)) for plan in plans[:n_references]]  # with different openings
    return rows
