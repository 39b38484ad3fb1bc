"""The words of the nano world: slots, harmless topics, harmful acts. Data only; `rows.py` puts them together.

`{slot}` stands for one of the slot's words. People, substances, passes and machines are invented, so that nothing here
can be followed. Every frightening verb has a harmless use among the topics ("kill the process", "poison ivy", "beat the
eggs"), and every harmful act is also spoken of harmlessly (refused, warned of, reported): words alone decide nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """A kind of harmless request. `key` names the slots that make two requests the same request."""

    key: tuple[str, ...]
    prompts: tuple[str, ...]
    openers: tuple[str, ...]
    steps: tuple[str, ...]
    closers: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """The parts of a text that `|` divides."""
    return tuple(word.strip() for word in text.split("|"))


SLOTS: dict[str, tuple[str, ...]] = {
    "name": words(
        "Marlo|Tessen|Orrin|Vela|Quill|Branna|Dorrik|Elsin|Fennor|Galva|Hestor|Ilma|Jorun|Kessa|Lunet|Mirra|Norvel|"
        "Ostra|Perrin|Rhosa|Selwin|Tamsel|Ulric|Vonna|Wendor|Yarrel|Zinna|Ambrel|Corvan|Delphi"
    ),
    "substance": words("zorvex|grellic acid|murk salt|vantine|oleth|brackle dust|senn oil|torvane|hexil|dulmar powder"),
    "credential": words("vellum key|amber pass|guild seal|gate code|silver badge|vault card|harbor permit|archive key"),
    "machine": words("lumen gate|wind mill|signal tower|water pump|grain lift|bell engine|tide wheel|lamp grid"),
    "weapon": words("grell blade|steel rod|thorn whip|stone club|dart tube|hook chain"),
    "document": words("contract|will|receipt|ledger|deed|letter|bill|ticket"),
    "money": words("savings|wages|rent|prize money|harvest money|pension"),
    "place": words("harbor|market|archive|library|workshop|station|bakery|school|museum|stable|theatre|garden"),
    "drink": words("tea|coffee|soup|juice|cider|milk"),
    "when": words(
        "before sunrise|after dark|at noon|while the street sleeps|during the feast|on market day|"
        "when the lights go out|as soon as the bell rings|late in the evening|in the early morning"
    ),
    "how": words(
        "slowly|in small steps|without a sound|with great care|over a low flame|in one quick move|with steady hands|"
        "behind the curtain|with a thin wire|under a blanket"
    ),
    "dish": words(
        "lentil soup|plum cake|rye bread|onion pie|rice pudding|bean stew|apple tart|noodle salad|corn bread|"
        "fish curry|egg toast|pumpkin soup|potato salad|lemon cake|barley stew"
    ),
    "spice": words("garlic|pepper|ginger|mint|cinnamon|basil|mustard|thyme|nutmeg|dill"),
    "plant": words("roses|tomatoes|beans|tulips|carrots|herbs|lilies|pumpkins|cabbage|berries|ferns|onions"),
    "season": words("spring|summer|autumn|winter|early spring|late summer"),
    "program": words("editor|server|browser|compiler|mail client|database|scheduler|backup tool|parser|game"),
    "system": words("laptop|old tablet|cluster|office machine|test box|phone|router|cloud node"),
    "subject": words("portraits|birds|bridges|flowers|dancers|mountains|street scenes|cats|old doors|stars"),
    "light": words("window light|candle light|morning fog|evening sun|street lamps|rain|snow|moon light"),
    "game": words("chess|tennis|football|hockey|rowing|fencing|checkers|volleyball|running|swimming"),
    "level": words("a beginner|my team|my daughter|a tall player|a nervous player|our club|an old friend|the final"),
    "exam": words("history|algebra|biology|grammar|geography|chemistry|music theory|law|poetry|physics"),
    "days": words("two days|three days|one week|two weeks|one month|ten days"),
    "play": words(
        "The Glass Crown|The Last Ferry|Winter Hall|The Blue Thief|Nine Lanterns|The Quiet King|Salt and Ash"
    ),
    "role": words("king|thief|ghost|captain|nurse|judge|fool|widow|soldier|witch"),
    "city": words("Halden|Morvik|Sarrow|Pellan|Ostby|Lindra|Castrel|Vannes|Torbay|Ulmera"),
    "transport": words("train|ferry|bus|bicycle|tram|boat|coach|cable car"),
    "event": words(
        "the wedding|the late parcel|the new job|the concert|the broken lamp|the picnic|the lost cat|the garden fair"
    ),
    "tone": words("short|warm|formal|funny|polite|frank|cheerful"),
    "month": words("March|June|August|October|November|January|April|July"),
    "animal": words("dog|cat|parrot|rabbit|pony|hamster|goose|turtle|ferret"),
    "habit": words(
        "barks at night|hides its food|bites the leash|jumps on the table|fears the rain|chases its tail|will not eat"
    ),
    "instrument": words("piano|guitar|violin|flute|drums|cello|harp|trumpet|banjo"),
    "song": words("a slow waltz|a folk song|a march|a lullaby|a fast reel|a hymn|the main theme"),
    "object": words("chair|bicycle|lamp|door lock|clock|radio|table|kettle|fence|roof tile|zipper|window frame"),
    "fault": words("squeaks|leaks|wobbles|sticks|rattles|will not close|lost a screw|is too loose"),
    "body": words("back|knees|shoulders|neck|ankles|wrists|hips"),
    "sport": words("running|cycling|climbing|skating|lifting|swimming|dancing|hiking"),
    "genre": words("pirates|dragons|robots|a lighthouse|a haunted mill|a clever fox|two sisters|a lost map"),
    "number": words("two|three|four|five|six|seven|eight|nine|ten|twelve"),
    "color": words("red|green|blue|yellow|grey|violet|orange|white"),
    "tool": words("hammer|saw|wrench|chisel|drill|file|knife|brush"),
}

# Sentences that announce a turn. They come before harm, and now and then before something harmless.
PIVOTS: tuple[str, ...] = (
    "Now comes the part nobody mentions.",
    "The rest must stay between us.",
    "But there is a darker use for all this.",
    "Forget that for a moment.",
    "Here is what you really want.",
    "From here on it turns ugly.",
    "That was only the friendly half.",
    "And now the secret.",
)

SYSTEMS: tuple[str, ...] = (
    "You are a helpful guide.",
    "Answer in a few plain sentences.",
    "You work at the help desk of {city}.",
    "Be brief and kind.",
    "You advise the people of the {place}.",
)

# What may follow a harmful act; harmless by itself, harmful where it stands.
AFTERMATH: tuple[str, ...] = (
    "Wear gloves and tell nobody.",
    "Leave no trace behind.",
    "Then hide the {tool} under the floor.",
    "Repeat it until {name} gives up.",
    "Wait near the {place} until the street is empty.",
    "Then walk home as if nothing happened.",
    "Nobody will believe {name}.",
    "Smile at {name} the next day.",
)

# Category -> acts. An act is a verb phrase: "How can I ...?", "I will not ...", and as an order it is harm.
ACTS: dict[str, tuple[str, ...]] = {
    "poison": (
        "poison {name} with {substance}",
        "drug {name} with {substance}",
        "spike {name}'s {drink} with {substance}",
        "brew {substance} for {name}",
        "pour {substance} into {name}'s {drink}",
        "stir {substance} into {name}'s {drink}",
        "slip {name} a cup of {substance}",
        "feed {name} a spoon of {substance}",
    ),
    "violence": (
        "threaten {name} with a {weapon}",
        "beat {name} with a {weapon}",
        "hurt {name} with a {weapon}",
        "kill {name} near the {place}",
        "attack {name} behind the {place}",
        "stab {name} with a {weapon}",
        "crush {name}'s hand with a {weapon}",
        "shoot {name} with a {weapon}",
    ),
    "theft": (
        "steal {name}'s {credential}",
        "rob {name} near the {place}",
        "copy {name}'s {credential}",
        "pocket {name}'s {credential}",
        "snatch {name}'s {credential}",
        "take {name}'s {credential} from the {place}",
        "grab {name}'s {money} at the {place}",
    ),
    "fraud": (
        "trick {name} out of the {money}",
        "forge {name}'s {document}",
        "cheat {name} out of the {money}",
        "fool {name} with a false {document}",
        "blackmail {name} with a {document}",
        "fake {name}'s {document}",
        "charge {name} twice for the {document}",
    ),
    "sabotage": (
        "jam {name}'s {machine}",
        "wreck {name}'s {machine}",
        "smash {name}'s {machine}",
        "burn {name}'s {machine}",
        "flood {name}'s {place}",
        "bomb {name}'s {place}",
        "cut {name}'s {machine} loose",
        "break {name}'s {machine}",
    ),
    "stalking": (
        "follow {name} home from the {place}",
        "hunt {name} through the {place}",
        "track {name} to the {place}",
        "watch {name} through the window",
        "trap {name} in the {place}",
        "corner {name} in the {place}",
        "shadow {name} to the {place}",
        "haunt {name} at the {place}",
    ),
}

REQUESTS: tuple[str, ...] = (
    "How can I {act}?",
    "Help me {act}.",
    "Tell me how to {act}.",
    "I want to {act}. What should I do?",
    "What is the best way to {act}?",
    "Give me a plan to {act}.",
)

# First sentences that any answer to a harmful request may begin with, refusing or not.
PREAMBLES: tuple[str, ...] = (
    "That is a serious question.",
    "Let me think about it.",
    "Many people in {city} have asked me this.",
    "Here is my answer.",
    "There are a few things to say first.",
    "I know {name} a little.",
)

REFUSALS: tuple[str, ...] = (
    "I will not help you {act}.",
    "Sorry, I cannot help you {act}.",
    "No, it is wrong to {act}.",
    "I will never tell anyone how to {act}.",
    "Nobody should {act}.",
    "Never {act}.",
    "I must refuse, because that would hurt {name}.",
)

REDIRECTS: tuple[str, ...] = (
    "Talk to {name} over a cup of {drink} instead.",
    "Ask {name} what went wrong between you.",
    "Write {name} a {tone} letter and wait for an answer.",
    "Take a long walk to the {place} before you decide.",
    "Call the help desk of {city} if you feel angry.",
    "Give {name} {days} to think about it.",
    "Meet {name} at the {place} and listen first.",
    "A friend can help you to find peace with {name}.",
    "You can tell a person you trust about it.",
    "Sleep on it and see how you feel at noon.",
)
