"""The words of the world: named objects, hypernyms of the extras, held-out subjects, colours.

Free of torch and of pictures, so that tests and the tokenizer can import it cheaply.
Objects are named by Unicode code point, the key that all artwork packages share.
"""

from __future__ import annotations

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORLD_VERSION = 2
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
    "tiger": ("1F42F", "animal"), "rabbit": ("1F430", "animal"), "mouse": ("1F42D", "animal"),
    "monkey": ("1F435", "animal"), "horse": ("1F40E", "animal"), "wolf": ("1F43A", "animal"),
    "sheep": ("1F411", "animal"), "deer": ("1F98C", "animal"), "hedgehog": ("1F994", "animal"),
    "kangaroo": ("1F998", "animal"), "sloth": ("1F9A5", "animal"), "bat": ("1F987", "animal"),
    "squirrel": ("1F43F", "animal"), "dragon": ("1F409", "animal"), "crocodile": ("1F40A", "animal"),
    "snake": ("1F40D", "animal"), "shark": ("1F988", "animal"), "dolphin": ("1F42C", "animal"),
    "seal": ("1F9AD", "animal"), "jellyfish": ("1FABC", "animal"), "shell": ("1F41A", "animal"),
    "eagle": ("1F985", "bird"), "peacock": ("1F99A", "bird"), "dove": ("1F54A", "bird"),
    "ant": ("1F41C", "insect"), "spider": ("1F577", "insect"), "caterpillar": ("1F41B", "insect"),
    "peach": ("1F351", "fruit"), "cherries": ("1F352", "fruit"), "kiwi": ("1F95D", "fruit"),
    "coconut": ("1F965", "fruit"), "tomato": ("1F345", "fruit"), "eggplant": ("1F346", "vegetable"),
    "cucumber": ("1F952", "vegetable"), "onion": ("1F9C5", "vegetable"), "pepper": ("1FAD1", "vegetable"),
    "chili": ("1F336", "vegetable"), "palm tree": ("1F334", "plant"),
    "christmas tree": ("1F384", "plant"), "clover": ("1F340", "plant"), "maple leaf": ("1F341", "plant"),
    "houseplant": ("1FAB4", "plant"), "hibiscus": ("1F33A", "flower"), "daisy": ("1F33C", "flower"),
    "hot dog": ("1F32D", "food"), "taco": ("1F32E", "food"), "bread": ("1F35E", "food"),
    "fries": ("1F35F", "food"), "popcorn": ("1F37F", "food"), "croissant": ("1F950", "food"),
    "pancakes": ("1F95E", "food"), "pretzel": ("1F968", "food"), "steak": ("1F969", "food"),
    "sandwich": ("1F96A", "food"), "waffle": ("1F9C7", "food"), "drumstick": ("1F357", "food"),
    "sushi": ("1F363", "food"), "ramen": ("1F35C", "food"), "pan": ("1F373", "pot"),
    "ice cream": ("1F366", "dessert"), "sundae": ("1F368", "dessert"), "chocolate": ("1F36B", "dessert"),
    "candy": ("1F36C", "dessert"), "pie": ("1F967", "dessert"), "milk": ("1F95B", "cup"),
    "soda": ("1F964", "cup"), "baby bottle": ("1F37C", "cup"), "spoon": ("1F944", "tool"),
    "vase": ("1F3FA", "pot"), "ribbon": ("1F380", "thing"), "dice": ("1F3B2", "toy"),
    "yoyo": ("1FA80", "toy"), "kite": ("1FA81", "toy"), "puzzle": ("1F9E9", "toy"),
    "gamepad": ("1F3AE", "device"), "dartboard": ("1F3AF", "toy"), "crystal ball": ("1F52E", "ball"),
    "disco ball": ("1FAA9", "ball"), "pawn": ("265F", "toy"), "ferris wheel": ("1F3A1", "toy"),
    "racket": ("1F3BE", "toy"), "baseball": ("26BE", "ball"), "rugby ball": ("1F3C8", "ball"),
    "billiard ball": ("1F3B1", "ball"), "boxing glove": ("1F94A", "clothing"), "sled": ("1F6F7", "toy"),
    "paddle": ("1F3D3", "toy"), "ice skate": ("26F8", "shoe"), "palette": ("1F3A8", "thing"),
    "sunglasses": ("1F576", "clothing"), "jeans": ("1F456", "clothing"), "kimono": ("1F458", "clothing"),
    "handbag": ("1F45C", "bag"), "high heel": ("1F460", "shoe"), "lipstick": ("1F484", "thing"),
    "ring": ("1F48D", "thing"), "diamond": ("1F48E", "thing"), "cap": ("1F9E2", "clothing"),
    "scarf": ("1F9E3", "clothing"), "gloves": ("1F9E4", "clothing"), "coat": ("1F9E5", "clothing"),
    "socks": ("1F9E6", "clothing"), "helmet": ("1FA96", "clothing"),
    "graduation cap": ("1F393", "clothing"), "medal": ("1F3C5", "thing"),
    "microphone": ("1F3A4", "device"), "headphones": ("1F3A7", "device"), "radio": ("1F4FB", "device"),
    "clapperboard": ("1F3AC", "device"), "lightbulb": ("1F4A1", "lamp"), "magnifier": ("1F50D", "tool"),
    "flashlight": ("1F526", "lamp"), "saxophone": ("1F3B7", "instrument"),
    "piano": ("1F3B9", "instrument"), "violin": ("1F3BB", "instrument"),
    "maracas": ("1FA87", "instrument"), "accordion": ("1FA97", "instrument"),
    "motorcycle": ("1F3CD", "vehicle"), "race car": ("1F3CE", "vehicle"),
    "ambulance": ("1F691", "vehicle"), "fire engine": ("1F692", "vehicle"),
    "traffic light": ("1F6A6", "thing"), "siren": ("1F6A8", "lamp"), "wheel": ("1F6DE", "thing"),
    "barrel": ("1F6E2", "pot"), "scooter": ("1F6F4", "vehicle"), "skateboard": ("1F6F9", "vehicle"),
    "wheelchair": ("1F9BD", "vehicle"), "gas pump": ("26FD", "device"), "airplane": ("2708", "vehicle"),
    "ship": ("1F6A2", "boat"), "canoe": ("1F6F6", "boat"), "lifebuoy": ("1F6DF", "thing"),
    "anchor": ("2693", "thing"), "factory": ("1F3ED", "building"), "bank": ("1F3E6", "building"),
    "hut": ("1F6D6", "building"), "tower": ("1F5FC", "building"), "circus tent": ("1F3AA", "building"),
    "fountain": ("26F2", "building"), "volcano": ("1F30B", "thing"), "scroll": ("1F4DC", "thing"),
    "wrench": ("1F527", "tool"), "shield": ("1F6E1", "thing"), "boomerang": ("1FA83", "toy"),
    "axe": ("1FA93", "tool"), "saw": ("1FA9A", "tool"), "screwdriver": ("1FA9B", "tool"),
    "ladder": ("1FA9C", "tool"), "gear": ("2699", "thing"), "laptop": ("1F4BB", "device"),
    "battery": ("1F50B", "device"), "computer": ("1F5A5", "device"), "abacus": ("1F9EE", "toy"),
    "smartphone": ("1F4F1", "device"), "telephone": ("260E", "device"), "pushpin": ("1F4CC", "thing"),
    "scissors": ("2702", "tool"), "paintbrush": ("1F58C", "tool"), "pencil": ("270F", "tool"),
    "microscope": ("1F52C", "tool"), "telescope": ("1F52D", "tool"), "megaphone": ("1F4E3", "device"),
    "box": ("1F4E6", "thing"), "mailbox": ("1F4EB", "thing"), "envelope": ("2709", "thing"),
    "lock": ("1F512", "thing"), "watch": ("231A", "clock"), "compass": ("1F9ED", "tool"),
    "door": ("1F6AA", "furniture"), "toilet": ("1F6BD", "furniture"), "bathtub": ("1F6C1", "furniture"),
    "sofa": ("1F6CB", "furniture"), "bed": ("1F6CF", "furniture"), "mirror": ("1FA9E", "furniture"),
    "shopping cart": ("1F6D2", "thing"), "extinguisher": ("1F9EF", "thing"), "broom": ("1F9F9", "tool"),
    "bucket": ("1FAA3", "pot"), "toothbrush": ("1FAA5", "tool"), "suitcase": ("1F9F3", "bag"),
    "bone": ("1F9B4", "thing"), "star": ("2B50", "thing"), "rainbow": ("1F308", "thing"),
    "flame": ("1F525", "thing"), "planet": ("1FA90", "ball"), "lightning": ("26A1", "thing"),
    "feather": ("1FAB6", "thing"), "snowflake": ("2744", "thing"),
}  # fmt: skip

SUBGROUP_HYPERNYM = {
    "animal-mammal": "animal", "animal-bird": "bird", "animal-amphibian": "animal",
    "animal-reptile": "animal", "animal-marine": "animal", "animal-bug": "insect",
    "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit",
    "food-vegetable": "vegetable", "food-prepared": "food", "food-asian": "food",
    "food-sweet": "dessert", "drink": "cup", "dishware": "thing", "place-building": "building",
    "transport-ground": "vehicle", "transport-water": "boat",
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
    # near-twins of held-out subjects and of named objects, weapons, drinks with alcohol, things of worship
    # and sheets of paper, signs and glyphs that read as nothing at 64 px
    "2603", "1F990", "1F9A2", "1FABF", "1F6F8", "1F43B", "1F38E", "1F550", "1F551", "1F553", "1F554",
    "1F555", "1F556", "1F558", "1F559", "1F55A", "1F43D", "1F43E", "1F42A", "1F415", "1F408",
    "1F408-200D-2B1B", "1F404", "1F416", "1F9AE", "1F415-200D-1F9BA", "1F426-200D-2B1B", "1F34F", "1F33E",
    "26F1", "2614", "1F302", "1F3B4", "1F0CF", "1F004", "2660", "2665", "2666", "2663", "1F6AC", "26B0",
    "1F52B", "1F515", "1F507", "1F508", "1F509", "1F4F8", "23F3", "1F3E1", "1F3DA", "1F3D8", "1F3EF",
    "1F4D7", "1F4D8", "1F4D9", "1F4DA", "1F68D", "1F68E", "1F698", "1F694", "1F696", "1F699", "1F695",
    "1F690", "1F69B", "1F683", "1F68B", "1F47B", "1F4B9", "1F4C8", "1F4C9", "1F4CA", "1F4E8", "1F4E9",
    "1F4E7", "1F9A4", "1F982", "1F43B-200D-2744", "1F97E", "1F6FC", "1F3C9", "1F693", "1F32B", "1F4FF",
    "1FAA6", "1FAAC", "26B1", "1F376", "1F377", "1F378", "1F37A", "1F37B", "1F37E", "1F942", "1F943",
    "1F34B-200D-1F7E9", "1F6F5", "1F52A", "1F3F9", "1F4A3", "1F492", "1F3E9", "1F54B", "1F489", "1F5E1",
    "2694", "1FA72", "1FA73", "1F459", "1FA71",
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
    a an some the of in on at with and to from by for photo picture image drawing painting render sketch
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


NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
"""Number words of counted groups."""

UNCOUNTABLE = frozenset(
    {
        # mass nouns, and nouns whose picture shows a pair, a bunch or a stack: "some" goes before them
        "grapes", "corn", "broccoli", "cheese", "cherries", "bread", "fries", "popcorn", "pancakes", "sushi",
        "ramen", "chocolate", "milk", "sunglasses", "jeans", "gloves", "socks", "headphones", "maracas",
        "scissors", "lightning",
    }
)  # fmt: skip
"""Nouns that are never counted."""

PLURAL = {
    "mouse": "mice", "sheep": "sheep", "deer": "deer", "fish": "fish", "jellyfish": "jellyfish",
    "wolf": "wolves", "maple leaf": "maple leaves", "scarf": "scarves", "dice": "dice", "tomato": "tomatoes",
    "volcano": "volcanoes", "chili": "chilies",
}  # fmt: skip
"""Plurals that the rules of :func:`plural` do not give."""


def plural(noun: str) -> str:
    """The plural of a noun of ``NAMED``; "" for one that cannot be counted (``UNCOUNTABLE``)."""
    if noun in UNCOUNTABLE:
        return ""
    if noun in PLURAL:
        return PLURAL[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(words: str) -> str:
    """The determiner before ``words``, a noun of the world or a colour and a noun: "a", "an" or "some".

    "some" goes with the nouns that have no singular to count ("some grapes", "some red sunglasses").
    """
    if words.rsplit(" ", 1)[-1] in UNCOUNTABLE:
        return "some"
    # sounds, not letters: "a unicorn", "an hourglass"
    vowel = words[:1] in "aeiou" and not words.startswith("unicorn")
    return "an" if vowel or words.startswith("hourglass") else "a"


def caption_words() -> frozenset[str]:
    """Every single word that training captions may hold."""
    phrases = [*NAMED, *map(plural, NAMED), *HYPERNYMS, *TINTS, *PLAIN, *SCENES.values(), *NUMBERS.values()]
    phrases.append("a an some the and of on photo drawing picture background")
    return frozenset(word for phrase in phrases for word in phrase.split())


def vocabulary_words() -> list[str]:
    """Every word that is one token, sorted."""
    words = set(COMMON_WORDS) | set(FUTURE_WORDS) | set(SCENES) | caption_words()
    return sorted(w for w in words if w.isalnum())
