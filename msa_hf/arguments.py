"""What the parsers of the commands share: the frame of a command, common options, kinds of values."""

import argparse
import json
import re

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZES |= {f"{name}i": 1 << 10 * power for power, name in enumerate("kmgt", 1)}


def command(subparsers, name: str, title: str, description: str, *lines: str) -> argparse.ArgumentParser:
    """A parser with help, examples and the options that every command has."""
    parser = subparsers.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}.\n\n{description}",
        epilog=examples(*lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--verbose", action="store_true", help="log what is done")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision to run the model in (default: as saved)",
    )


def add_batch_tokens(parser: argparse.ArgumentParser) -> None:
    text = "tokens encoded at once (default: one document on a CPU, 16384 tokens elsewhere)"
    parser.add_argument("--batch-tokens", type=positive, metavar="N", help=text)


def batch_tokens(options: argparse.Namespace) -> dict[str, int]:
    """What `add_batch_tokens` was given, as an argument of whatever encodes."""
    return {"batch_tokens": options.batch_tokens} if options.batch_tokens else {}


def add_store_settings(parser: argparse.ArgumentParser) -> None:
    """What a new store is made with; None where nothing is said."""
    group = parser.add_argument_group("a new store")
    for name, what in (("key", "keys"), ("value", "values"), ("router", "router keys")):
        group.add_argument(
            f"--{name}-bits",
            type=bits,
            metavar="N",
            help=f'bits per number of {what}: 1 to 4, or "dense" for none saved (default 4)',
        )
    group.add_argument(
        "--budget-bytes",
        type=byte_count,
        metavar="SIZE",
        help="of vectors, as 500MB or 2GiB; beyond it the least useful documents take fewer bits",
    )


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {text!r}")
    return int(text)


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def bits(text: str) -> int | str:
    if text == "dense":
        return text
    if text not in ("1", "2", "3", "4"):
        raise argparse.ArgumentTypeError(f'must be 1, 2, 3, 4 or "dense", got {text!r}')
    return int(text)


def byte_count(text: str) -> int:
    """A number of bytes: 1000000, 500MB, 1.5 GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)?b?)", text.strip(), re.I)
    if found is None or not (number := int(float(found[1]) * _SIZES[(found[2] or "").lower()])):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 2GiB, got {text!r}")
    return number


def name_and_value(text: str) -> tuple[str, list]:
    """(NAME, what VALUE may stand for): `year=1843` finds the number as well as the text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return name, [value]
    return name, [value] if isinstance(read, (list, dict, str)) else [value, read]


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object; {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def print_json(value: dict) -> None:
    print(json.dumps(value))
