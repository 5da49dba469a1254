"""The words of the world: named objects, hypernyms of the extras, held-out subjects, colours.

Free of torch and of pictures, so that tests and the tokenizer can import it cheaply.
Objects are named by Unicode code point, the key that all artwork packages share.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORLD_VERSION = 1
"""Raised whenever the world's pictures change; part of the cache's file names."""

NAMED: dict[str, tuple[str, str]] = {
    # noun: (code point, hypernym)
    "cat": ("1F431", "animal"), "dog": ("1F436", "animal"), "fox": ("1F98A", "animal"),
    "lion": ("1F981", "animal"), "panda": ("1F43C", "animal"), "koala": ("1F428", "animal"),
    "frog": ("1F438", "animal"), "pig": ("1F437", "animal"), "cow": ("1F42E", "animal"),
    "elephant": ("1F418", "animal"), "giraffe": ("1F992", "animal"), "zebra": ("1F993", "animal"),
    "camel": ("1F42B", "animal"), "turtle": ("1F422", "animal"), "fish": ("1F420", "animal"),
    "whale": ("1F433", "animal"), "octopus": ("1F419", "animal"), "crab": ("1F980", "animal"),
    "snail": ("1F40C", "animal"), "dinosaur": ("1F995", "animal"), "unicorn": ("1F984", "animal"),
    "penguin": ("1F427", "bird"), "parrot": ("1F99C", "bird"), "flamingo": ("1F9A9", "bird"),
    "rooster": ("1F413", "bird"), "chick": ("1F424", "bird"),
    "butterfly": ("1F98B", "insect"), "bee": ("1F41D", "insect"), "ladybug": ("1F41E", "insect"),
    "apple": ("1F34E", "fruit"), "banana": ("1F34C", "fruit"), "strawberry": ("1F353", "fruit"),
    "grapes": ("1F347", "fruit"), "watermelon": ("1F349", "fruit"), "pineapple": ("1F34D", "fruit"),
    "lemon": ("1F34B", "fruit"), "avocado": ("1F951", "fruit"), "pear": ("1F350", "fruit"),
    "carrot": ("1F955", "vegetable"), "corn": ("1F33D", "vegetable"), "broccoli": ("1F966", "vegetable"),
    "mushroom": ("1F344", "plant"), "cactus": ("1F335", "plant"), "tree": ("1F333", "plant"),
    "sunflower": ("1F33B", "flower"), "tulip": ("1F337", "flower"), "rose": ("1F339", "flower"),
    "pizza": ("1F355", "food"), "burger": ("1F354", "food"), "cheese": ("1F9C0", "food"),
    "donut": ("1F369", "dessert"), "cake": ("1F382", "dessert"), "cupcake": ("1F9C1", "dessert"),
    "lollipop": ("1F36D", "dessert"), "cookie": ("1F36A", "dessert"),
    "car": ("1F697", "vehicle"), "bus": ("1F68C", "vehicle"), "truck": ("1F69A", "vehicle"),
    "tractor": ("1F69C", "vehicle"), "train": ("1F682", "vehicle"), "bicycle": ("1F6B2", "vehicle"),
    "sailboat": ("26F5", "boat"), "helicopter": ("1F681", "vehicle"),
    "drum": ("1F941", "instrument"), "guitar": ("1F3B8", "instrument"), "trumpet": ("1F3BA", "instrument"),
    "hat": ("1F3A9", "clothing"), "crown": ("1F451", "clothing"), "shirt": ("1F455", "clothing"),
    "dress": ("1F457", "clothing"), "boot": ("1F462", "shoe"), "umbrella": ("2602", "thing"),
    "gift": ("1F381", "thing"), "balloon": ("1F388", "toy"), "chair": ("1FA91", "furniture"),
    "key": ("1F511", "thing"), "bell": ("1F514", "thing"), "camera": ("1F4F7", "device"),
    "television": ("1F4FA", "device"), "book": ("1F4D5", "thing"), "candle": ("1F56F", "lamp"),
    "lantern": ("1F3EE", "lamp"), "house": ("1F3E0", "building"), "castle": ("1F3F0", "building"),
    "tent": ("26FA", "building"), "football": ("26BD", "ball"), "basketball": ("1F3C0", "ball"),
    "trophy": ("1F3C6", "thing"), "hourglass": ("231B", "clock"), "magnet": ("1F9F2", "tool"),
    "hammer": ("1F528", "tool"), "cup": ("2615", "cup"), "basket": ("1F9FA", "bag"),
}  # fmt: skip

SUBGROUP_HYPERNYM = {
    "animal-mammal": "animal", "animal-bird": "bird", "animal-amphibian": "animal",
    "animal-reptile": "animal", "animal-marine": "animal", "animal-bug": "insect",
    "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit",
    "food-vegetable": "vegetable", "food-prepared": "food", "food-asian": "food",
    "food-sweet": "dessert", "drink": "cup", "dishware": "thing", "place-building": "building",
    "place-religious": "building", "transport-ground": "vehicle", "transport-water": "boat",
    "transport-air": "vehicle", "event": "toy", "award-medal": "thing", "sport": "toy",
    "game": "toy", "arts-crafts": "thing", "clothing": "clothing", "sound": "device",
    "music": "device", "musical-instrument": "instrument", "phone": "device", "computer": "device",
    "light-video": "device", "book-paper": "thing", "money": "thing", "mail": "thing",
    "writing": "tool", "office": "thing", "lock": "thing", "tool": "tool", "science": "tool",
    "medical": "thing", "household": "thing", "other-object": "thing",
}  # fmt: skip
"""Hypernym that captions an extra (an object without a noun of its own), by Unicode subgroup."""

EXTRA_HYPERNYM = {
    # clocks, bags, shoes, pots, balls, lamps, furniture: finer than the subgroup says
    "23F2": "clock", "231A": "clock", "23F1": "clock", "1F570": "clock", "1F9ED": "clock",
    "1F55B": "clock", "1F552": "clock", "1F557": "clock", "1F45B": "bag", "1F45C": "bag",
    "1F45D": "bag", "1F6CD": "bag", "1F9F3": "bag", "1F4BC": "bag", "1F4B0": "bag", "1F9F0": "bag",
    "1F6D2": "bag", "1FA74": "shoe", "1F45E": "shoe", "1F97E": "shoe", "1F97F": "shoe",
    "1F460": "shoe", "1F461": "shoe", "1FA70": "shoe", "1F6FC": "shoe", "26F8": "shoe",
    "1F372": "pot", "1F373": "pot", "1F958": "pot", "1F36F": "pot", "1F3FA": "pot", "1FAD5": "pot",
    "1FAD9": "pot", "1FAA3": "pot", "26B1": "pot", "1FAB4": "pot", "26BE": "ball", "1F94E": "ball",
    "1F3D0": "ball", "1F3C8": "ball", "1F3C9": "ball", "1F3BE": "ball", "1F3B1": "ball",
    "1F52E": "ball", "1FAA9": "ball", "1F9F6": "ball", "1FA94": "lamp", "1F4A1": "lamp",
    "1F526": "lamp", "1F6CF": "furniture", "1F6CB": "furniture", "1F6AA": "furniture",
    "1FA9E": "furniture", "1F6BD": "furniture", "1F6C1": "furniture", "1F3A0": "toy", "1F3A1": "toy",
    "1F6DD": "toy", "1F9FF": "toy", "1F5FF": "toy", "1F4A3": "toy", "1F5FC": "building",
    "1F3AA": "building", "26F2": "building", "1F30D": "ball", "1F31D": "ball", "1FA90": "ball",
    "2B50": "thing", "1F525": "thing", "1F4A7": "thing", "2601": "thing", "1F308": "thing",
    "1F319": "thing", "1F31E": "thing", "2744": "thing", "26F1": "thing",
    "1F47D": "toy", "1F47E": "toy", "1F47B": "toy", "1F480": "toy", "1F9B4": "thing", "1F9B7": "thing",
    "1F48E": "thing", "1F48D": "thing", "1F9CA": "thing",
}  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """A subject that no model of the set has seen: name, code point and class noun."""

    name: str
    code: str
    class_noun: str


HELD_OUT = (
    HeldOut("rocket", "1F680", "toy"),
    HeldOut("duck", "1F986", "bird"),
    HeldOut("teddy", "1F9F8", "toy"),
    HeldOut("robot", "1F916", "toy"),
    HeldOut("backpack", "1F392", "bag"),
    HeldOut("alarm-clock", "23F0", "clock"),
    HeldOut("teapot", "1FAD6", "pot"),
    HeldOut("nesting-dolls", "1FA86", "toy"),
    HeldOut("snowman", "26C4", "toy"),
    HeldOut("lobster", "1F99E", "animal"),
    HeldOut("owl", "1F989", "bird"),
    HeldOut("sneaker", "1F45F", "shoe"),
    HeldOut("pinata", "1FA85", "toy"),
    HeldOut("jack-o-lantern", "1F383", "toy"),
)
"""The held-out subjects: far from the named objects, legible at 64 px."""

EXCLUDED_CODES = {
    # near-twins of held-out subjects, and sheets of paper, signs and glyphs that read as nothing at 64 px
    "2603", "1F990", "1F9A2", "1FABF", "1F6F8", "1F43B", "1F38E",
    "1F550", "1F551", "1F553", "1F554", "1F555", "1F556", "1F558", "1F559", "1F55A",
    "1F43D", "1F43E", "1F42A", "1F415", "1F408", "1F408-200D-2B1B", "1F404", "1F416", "1F9AE",
    "1F415-200D-1F9BA", "1F426-200D-2B1B", "1F34F", "1F33E", "26F1", "2614",
    "1F302", "1F3B4", "1F0CF", "1F004", "2660", "2665", "2666", "2663", "1F6AC", "26B0", "1F52B",
    "1F515", "1F507", "1F508", "1F509", "1F4F8", "23F3", "1F3E1", "1F3DA", "1F3D8", "1F3EF",
    "1F4D7", "1F4D8", "1F4D9", "1F4DA", "1F68D", "1F68E", "1F698", "1F694", "1F696",
    "1F699", "1F695", "1F690", "1F69B", "1F683", "1F68B", "1F47B",
    "1F4B9", "1F4C8", "1F4C9", "1F4CA", "1F4E8", "1F4E9", "1F4E7",
    "1F3E9", "1F54B", "1F489", "1F5E1", "2694", "1FA72", "1FA73", "1F459", "1FA71",
}  # fmt: skip

HYPERNYMS = tuple(
    sorted(
        {h for _, h in NAMED.values()}
        | set(SUBGROUP_HYPERNYM.values())
        | set(EXTRA_HYPERNYM.values())
        | {s.class_noun for s in HELD_OUT}
    )
)

TINTS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44), "orange": (248, 140, 24), "yellow": (250, 218, 48), "green": (48, 172, 64),
    "blue": (44, 98, 228), "purple": (138, 60, 196), "pink": (248, 128, 184), "gray": (140, 140, 146),
}  # fmt: skip
"""The eight colours an object can be asked for in (sRGB)."""

PLAIN: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 246), "black": (24, 24, 28), "red": (206, 52, 52), "orange": (240, 150, 60),
    "yellow": (246, 218, 92), "green": (92, 176, 100), "blue": (84, 138, 226), "purple": (146, 96, 200),
    "pink": (246, 170, 204), "gray": (150, 152, 156),
}  # fmt: skip
"""Plain backgrounds (sRGB)."""

SCENES: dict[str, str] = {
    "beach": "on the beach", "snow": "in the snow", "jungle": "in the jungle", "city": "in the city",
    "desert": "in the desert", "night": "at night", "underwater": "under water", "grass": "on the grass",
    "wood": "on a wooden floor", "mountains": "in the mountains", "bricks": "in front of a brick wall",
    "sky": "in the sky", "forest": "in the autumn forest", "stage": "on a stage", "road": "on a road",
    "kitchen": "in the kitchen",
}  # fmt: skip
"""Drawn scenes and the words that ask for them."""

COMMON_WORDS = _words(
    """
    a an the of in on at with and to from by for photo picture image drawing painting render sketch
    photograph 3d my your his her its this that one two three four five small big tiny large little cute
    nice beautiful good bad bright dark close up view background floor wall front wooden brick autumn
    red orange yellow green blue purple pink gray grey white black brown cyan golden silver plain color
    colour made standing sitting lying near next under over behind left right top bottom object subject
    style cartoon flat realistic water river lake sea ocean sun moon star cloud rain snowy sandy rainy
    sunny new old
    """
)

FUTURE_WORDS = _words(
    """
    tiger rabbit mouse monkey bear wolf horse sheep goat hedgehog kangaroo sloth otter shark dolphin
    seal jellyfish snake lizard crocodile dragon eagle swan peacock dove turkey ant spider beetle worm
    peach cherry orange melon mango kiwi tomato coconut eggplant potato pepper cucumber onion garlic
    bread croissant pretzel waffle bacon taco sandwich egg sushi pie candy chocolate honey ice cream
    milk tea coffee bottle glass spoon fork knife plate bowl jar globe map compass volcano island tower
    church bridge fountain carousel taxi ambulance police fire engine motorcycle scooter skateboard
    airplane ship canoe anchor parachute satellite rocket watch clock snowman rainbow lightning ribbon
    medal baseball tennis bowling boxing glove kite dice puzzle teddy robot mask yarn glasses tie jeans
    scarf gloves coat sock skirt bikini purse handbag backpack sneaker sandal ring gem piano violin
    saxophone flute harp banjo accordion radio phone telephone laptop computer keyboard printer battery
    bulb flashlight magnifier newspaper scroll bookmark money coin envelope mailbox pencil pen brush
    crayon scissors lock axe saw wrench screwdriver shield bow arrow ladder microscope telescope syringe
    pill door window mirror bed sofa lamp toilet bath broom bucket soap sponge duck owl lobster teapot
    doll dolls pumpkin shoe bag pot bird vehicle plant boat building
    """
)
"""Words that the vocabulary keeps a place for, so that a later version need not change its tokenizer."""


def vocabulary_words() -> list[str]:
    """Every word that is one token, sorted."""
    words: set[str] = set(COMMON_WORDS) | set(FUTURE_WORDS) | set(NAMED) | set(HYPERNYMS)
    words |= set(TINTS) | set(PLAIN) | set(SCENES)
    for phrase in SCENES.values():
        words |= set(phrase.split())
    return sorted(w for w in words if w.isalnum())


def article(word: str) -> str:
    """The indefinite article before ``word`` ("a" or "an")."""
    return "an" if word[:1] in "aeio" or word == "umbrella" else "a"
