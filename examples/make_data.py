"""Makes the example data: spoken requests to one-line JSON tool calls, as chat records in JSONL.

    python make_data.py [FOLDER] [--seed N]

Writes train.jsonl, valid.jsonl and test.jsonl into FOLDER (default: data/).

Every split has its own phrasings, so exact match on the test split measures learning, not
memorization. Some values (names, cities, items) are in all splits, others only in the test split.
"""

import argparse
import json
import random
from pathlib import Path

SYSTEM = 'You run a home. Reply with one line of compact JSON: {"tool":...} and its arguments.'
SIZES = {"train": 1500, "valid": 100, "test": 100}

NUMBERS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "eight": 8, "ten": 10, "twelve": 12,
    "fifteen": 15,
    "twenty": 20, "twenty five": 25, "thirty": 30, "forty": 40, "forty five": 45, "fifty": 50,
    "ninety": 90,
}  # fmt: skip
COUNTS = {word: n for word, n in NUMBERS.items() if n <= 12}
DEGREES = {
    "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "twenty one": 21,
    "twenty two": 22,
    "twenty three": 23, "twenty four": 24,
}  # fmt: skip
HOURS = {"five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
MINUTES = {"o'clock": 0, "fifteen": 15, "thirty": 30, "forty five": 45}
TIMES = {
    f"{h} {m}": f"{hour:02d}:{minute:02d}"
    for h, hour in HOURS.items()
    for m, minute in MINUTES.items()
}


def same(*words: str) -> dict[str, object]:
    return {word: word for word in words}


# Spoken words -> value in the call. Values in NEW occur only in the test split.
VALUES: dict[str, dict[str, object]] = {
    "minutes": dict(NUMBERS),
    "count": dict(COUNTS),
    "degrees": dict(DEGREES),
    "time": dict(TIMES),
    "state": same("on", "off"),
    "day": same(
        "today", "tomorrow", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday",
        "sunday",
    ),
    "room": same(
        "kitchen", "bedroom", "bathroom", "hall", "office", "garage", "living room", "attic",
    ),
    "label": same(
        "pasta", "tea", "eggs", "rice", "pizza", "laundry", "bread", "workout", "homework", "cake",
        "soup",
    ),
    "artist": same(
        "nina simone", "miles davis", "abba", "queen", "the beatles", "mozart", "bob marley",
        "adele", "daft punk",
    ),
    "to": same(
        "anna", "ben", "mum", "dad", "carla", "david", "grandma", "lucy", "tom", "sarah",
        "the boss", "peter",
    ),
    "text": same(
        "i am running late", "dinner is ready", "call me back", "the train is late",
        "happy birthday",
        "we need milk", "see you at eight", "the key is under the mat", "i am on my way",
        "the meeting is off",
        "thank you for the flowers", "good luck", "i will be home soon", "please feed the cat",
    ),
    "city": same(
        "paris", "london", "berlin", "oslo", "madrid", "tokyo", "boston", "chicago", "cairo",
        "sydney", "delhi",
    ),
    "item": same(
        "apples", "lemons", "bananas", "onions", "eggs", "carrots", "yogurts", "candles",
        "batteries", "tomatoes",
    ),
}  # fmt: skip
NEW: dict[str, dict[str, object]] = {
    "label": same("potatoes", "chicken"),
    "artist": same("elton john", "the doors"),
    "to": same("maria", "uncle joe"),
    "text": same("the dog is fine", "we are at the station"),
    "city": same("rome", "vienna"),
    "item": same("peaches", "light bulbs"),
}

# tool -> split -> phrasings. The arguments of a call stand in the order of ARGUMENTS.
ARGUMENTS = {
    "timer": ("minutes", "label"),
    "alarm": ("day", "time"),
    "light": ("room", "state"),
    "heating": ("room", "degrees"),
    "music": ("artist", "room"),
    "message": ("to", "text"),
    "weather": ("city", "day"),
    "shopping": ("item", "count"),
}
PHRASINGS: dict[str, dict[str, list[str]]] = {
    "timer": {
        "train": [
            "set a timer for {minutes} minutes for the {label}",
            "set a {minutes} minute timer for the {label}",
            "start a {minutes} minute {label} timer",
            "timer for the {label} {minutes} minutes please",
            "i need a timer for the {label} of {minutes} minutes",
            "count down {minutes} minutes for the {label}",
            "the {label} needs {minutes} minutes set a timer",
            "tell me when {minutes} minutes are over for the {label}",
            "can you time the {label} for {minutes} minutes",
            "please start a timer {minutes} minutes for {label}",
            "give me {minutes} minutes for the {label}",
            "remind me of the {label} in {minutes} minutes",
            "{label} timer {minutes} minutes",
            "could you set {minutes} minutes on the clock for the {label}",
            "the {label} has to be done in {minutes} minutes set the timer",
            "put {minutes} minutes on the timer for my {label}",
            "new timer {label} {minutes} minutes",
            "start timing the {label} it takes {minutes} minutes",
        ],
        "valid": [
            "make a timer of {minutes} minutes for the {label}",
            "my {label} takes {minutes} minutes start a timer",
            "{minutes} minutes for the {label} please",
        ],
        "test": [
            "would you start a timer for my {label} say {minutes} minutes",
            "let me know when the {label} has had {minutes} minutes",
            "i want to be told about the {label} after {minutes} minutes",
            "{minutes} minute countdown for the {label}",
            "begin a timer called {label} with {minutes} minutes",
        ],
    },
    "alarm": {
        "train": [
            "set an alarm for {day} at {time}",
            "wake me up {day} at {time}",
            "wake me at {time} {day}",
            "i need to get up at {time} {day}",
            "alarm at {time} {day} please",
            "please set my alarm to {time} for {day}",
            "can you wake me {day} at {time}",
            "{day} i have to be up at {time}",
            "make sure i am awake {day} at {time}",
            "new alarm {day} {time}",
            "put an alarm on {day} at {time}",
            "i want to wake up at {time} {day}",
            "ring at {time} {day}",
            "get me out of bed {day} at {time}",
            "could you set the alarm clock for {time} {day}",
            "alarm for {day} {time}",
            "have the alarm go off at {time} {day}",
            "{day} wake up call at {time}",
        ],
        "valid": [
            "let the alarm ring {day} at {time}",
            "i must not oversleep {day} set the alarm for {time}",
            "{time} {day} is when i get up set an alarm",
        ],
        "test": [
            "would you wake me up at {time} {day}",
            "an alarm {day} please {time}",
            "my day starts at {time} {day} wake me then",
            "see that i am up {day} by {time}",
            "schedule an alarm {day} at {time}",
        ],
    },
    "light": {
        "train": [
            "turn {state} the light in the {room}",
            "turn the {room} light {state}",
            "switch {state} the lights in the {room}",
            "switch the {room} lights {state}",
            "lights {state} in the {room}",
            "{room} light {state}",
            "please turn the light in the {room} {state}",
            "can you switch the light {state} in the {room}",
            "the light in the {room} should be {state}",
            "i want the {room} lights {state}",
            "put the {room} light {state}",
            "could you turn {state} the {room} lamp",
            "make the light in the {room} go {state}",
            "flip the {room} light {state}",
            "set the light in the {room} to {state}",
            "light {state} in the {room} please",
            "i am in the {room} turn the light {state}",
            "the {room} lamps {state} please",
        ],
        "valid": [
            "have the lights in the {room} {state}",
            "{state} with the light in the {room}",
            "in the {room} switch the lamp {state}",
        ],
        "test": [
            "would you turn {state} the lights of the {room}",
            "in the {room} i need the light {state}",
            "change the {room} light to {state}",
            "get the light in the {room} {state}",
            "all lights {state} in the {room}",
        ],
    },
    "heating": {
        "train": [
            "set the heating in the {room} to {degrees} degrees",
            "heat the {room} to {degrees} degrees",
            "make the {room} {degrees} degrees",
            "{room} heating to {degrees}",
            "i want {degrees} degrees in the {room}",
            "warm up the {room} to {degrees} degrees",
            "please put the {room} at {degrees} degrees",
            "can you set the {room} thermostat to {degrees}",
            "set {degrees} degrees in the {room}",
            "the {room} should be {degrees} degrees",
            "thermostat in the {room} to {degrees} please",
            "bring the {room} to {degrees} degrees",
            "keep the {room} at {degrees} degrees",
            "could you heat up the {room} to {degrees}",
            "temperature in the {room} {degrees} degrees",
            "turn the heating in the {room} to {degrees}",
            "it should be {degrees} degrees in the {room}",
            "change the {room} temperature to {degrees} degrees",
        ],
        "valid": [
            "get the {room} to {degrees} degrees",
            "{degrees} degrees for the {room} please",
            "adjust the {room} heating to {degrees}",
        ],
        "test": [
            "would you make it {degrees} degrees in the {room}",
            "let the {room} be heated to {degrees} degrees",
            "my {room} needs to be at {degrees} degrees",
            "put the thermostat of the {room} on {degrees}",
            "heating for the {room} {degrees} degrees",
        ],
    },
    "music": {
        "train": [
            "play {artist} in the {room}",
            "play some {artist} in the {room}",
            "put on {artist} in the {room}",
            "i want to hear {artist} in the {room}",
            "music by {artist} in the {room} please",
            "can you play {artist} in the {room}",
            "start {artist} in the {room}",
            "in the {room} play {artist}",
            "let me hear {artist} in the {room}",
            "please put {artist} on in the {room}",
            "{artist} in the {room}",
            "could you put on some {artist} in the {room}",
            "i feel like listening to {artist} in the {room}",
            "play songs by {artist} in the {room}",
            "some {artist} for the {room} please",
            "stream {artist} in the {room}",
            "play me {artist} in the {room}",
            "turn on music by {artist} in the {room}",
        ],
        "valid": [
            "give me {artist} in the {room}",
            "have the speaker in the {room} play {artist}",
            "the {room} needs some {artist}",
        ],
        "test": [
            "would you play something by {artist} in the {room}",
            "i would love some {artist} in the {room}",
            "start playing {artist} on the {room} speaker",
            "for the {room} some music by {artist}",
            "how about {artist} in the {room}",
        ],
    },
    "message": {
        "train": [
            "tell {to} {text}",
            "text {to} {text}",
            "send {to} a message saying {text}",
            "send a message to {to} {text}",
            "message {to} that {text}",
            "let {to} know that {text}",
            "please tell {to} that {text}",
            "can you text {to} that {text}",
            "write to {to} {text}",
            "message to {to} {text}",
            "say to {to} {text}",
            "could you send {to} the words {text}",
            "i want to tell {to} {text}",
            "new message for {to} {text}",
            "drop {to} a line saying {text}",
            "send a text to {to} saying {text}",
            "write {to} a message {text}",
            "please let {to} know {text}",
        ],
        "valid": [
            "inform {to} that {text}",
            "send this to {to} {text}",
            "a note for {to} saying {text}",
        ],
        "test": [
            "would you write {to} that {text}",
            "get a message to {to} saying {text}",
            "shoot {to} a text that says {text}",
            "i have a message for {to} {text}",
            "pass on to {to} that {text}",
        ],
    },
    "weather": {
        "train": [
            "what is the weather in {city} {day}",
            "how is the weather in {city} {day}",
            "weather in {city} {day}",
            "weather for {city} {day} please",
            "will it rain in {city} {day}",
            "tell me the weather in {city} for {day}",
            "is it going to be sunny in {city} {day}",
            "what will the weather be like in {city} {day}",
            "do i need an umbrella in {city} {day}",
            "{day} what is the weather in {city}",
            "give me the forecast for {city} {day}",
            "forecast {city} {day}",
            "how warm will it be in {city} {day}",
            "can you check the weather in {city} {day}",
            "please look up the weather in {city} for {day}",
            "is it cold in {city} {day}",
            "i am going to {city} {day} how is the weather",
            "show me the {city} weather for {day}",
        ],
        "valid": [
            "what does the forecast say for {city} {day}",
            "does it snow in {city} {day}",
            "{city} {day} what is the weather",
        ],
        "test": [
            "would you tell me how the weather in {city} is {day}",
            "what can i expect from the weather in {city} {day}",
            "do i need a coat in {city} {day}",
            "{day} in {city} will it be sunny",
            "any rain in {city} {day}",
        ],
    },
    "shopping": {
        "train": [
            "add {count} {item} to the shopping list",
            "put {count} {item} on the shopping list",
            "put {count} {item} on the list",
            "we need {count} {item}",
            "i need to buy {count} {item}",
            "buy {count} {item}",
            "shopping list {count} {item}",
            "please add {count} {item} to my list",
            "can you put {count} {item} on my shopping list",
            "remind me to buy {count} {item}",
            "we are out of {item} get {count}",
            "{count} {item} for the shopping list",
            "write down {count} {item} for the shop",
            "add {item} to the list {count} of them",
            "i want {count} {item} on the list",
            "get {count} {item} from the shop",
            "could you add {count} {item} to the groceries",
            "note {count} {item} for shopping",
        ],
        "valid": [
            "{item} are missing add {count} to the list",
            "next time we shop get {count} {item}",
            "also {count} {item} on the list",
        ],
        "test": [
            "would you add another {count} {item} to the shopping list",
            "the shopping list should have {count} {item}",
            "from the store i need {count} {item}",
            "we have to get {count} {item}",
            "list {count} {item} for my next shopping",
        ],
    },
}


def record(
    tool: str, phrasing: str, said: dict[str, str], values: dict[str, object]
) -> dict[str, object]:
    call = {"tool": tool, **{name: values[name] for name in ARGUMENTS[tool]}}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": phrasing.format(**said)},
            {"role": "assistant", "content": json.dumps(call, separators=(",", ":"))},
        ]
    }


def make(split: str, rng: random.Random) -> list[dict[str, object]]:
    """The records of one split: all different; tools and phrasings occur equally often."""
    pairs = [(tool, phrasing) for tool, splits in PHRASINGS.items() for phrasing in splits[split]]
    records: dict[str, dict[str, object]] = {}
    for turn in range(100 * SIZES[split]):
        if len(records) == SIZES[split]:
            break
        if turn % len(pairs) == 0:
            rng.shuffle(pairs)
        tool, phrasing = pairs[turn % len(pairs)]
        said: dict[str, str] = {}
        values: dict[str, object] = {}
        for name in ARGUMENTS[tool]:
            # In the test split, half of the values come from NEW, if it has any for the name.
            new = split == "test" and name in NEW and rng.random() < 0.5
            said[name], values[name] = rng.choice(list((NEW if new else VALUES)[name].items()))
        made = record(tool, phrasing, said, values)
        records.setdefault(json.dumps(made), made)
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        lines = [json.dumps(r) + "\n" for r in make(split, random.Random(f"{split} {args.seed}"))]
        (args.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{args.folder / split}.jsonl: {len(lines)} records")


if __name__ == "__main__":
    main()
