"""Word lists behind the generated chats; every answer is one short word or phrase."""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    return {left.replace("_", " "): right.replace("_", " ") for left, right in (e.split(":") for e in text.split())}


def _words(text: str) -> list[str]:
    return text.split()


CAPITALS = _pairs(
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Poland:Warsaw Greece:Athens "
    "Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Hungary:Budapest Russia:Moscow "
    "Japan:Tokyo China:Beijing India:New_Delhi Egypt:Cairo Kenya:Nairobi Peru:Lima Cuba:Havana Canada:Ottawa "
    "Iran:Tehran"
)
OPPOSITES = _pairs(
    "hot:cold big:small up:down left:right open:closed day:night good:bad fast:slow old:new happy:sad light:dark "
    "high:low full:empty hard:soft rich:poor strong:weak wet:dry early:late true:false first:last in:out yes:no "
    "push:pull begin:end"
)
COLOURS = _pairs(
    "grass:green snow:white coal:black blood:red a_lemon:yellow a_carrot:orange the_sky:blue a_tomato:red milk:white "
    "the_sea:blue a_leaf:green a_banana:yellow a_crow:black a_cherry:red a_frog:green a_pumpkin:orange"
)
SOUNDS = _pairs("dog:woof cat:meow cow:moo duck:quack sheep:baa pig:oink bee:buzz lion:roar owl:hoot snake:hiss")
ANIMAL_LEGS = _pairs("dog:4 cat:4 bird:2 spider:8 ant:6 fish:0 horse:4 snake:0 hen:2 bee:6")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Walter")
WORDS = _words(
    "apple bread chair dance eagle flame glass house iron juice king lamp moon night ocean paper queen river stone "
    "table uncle voice water yard zebra cloud dream field garden honey island jacket kitten ladder market needle"
)
SHORT_WORDS = _words(
    "cat dog sun map pen cup hat bed box car bus net pot lid jam fog pig ant owl fox ice oak sea sky toy van web zip"
)
CITIES = sorted(set(CAPITALS.values()))
