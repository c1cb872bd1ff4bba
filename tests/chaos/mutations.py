"""Small damages, drawn at random: of bytes, of lines of text, of JSON values, of tar headers."""

import json
import tarfile
from random import Random
from typing import Any

HUGE = 10**18
BLOCK = tarfile.BLOCKSIZE
PNG_SIZE = b"IHDR" + (16).to_bytes(4, "big") + (12).to_bytes(4, "big")
SCALARS = (
    *(
        "",
        "~",
        "null",
        "true",
        "off",
        "-1",
        "0",
        "1",
        "1.5",
        "1e400",
        "-.inf",
        ".nan",
        "0x7fffffff",
    ),
    *(
        "9" * 5000,
        "1" + "0" * 400,
        "2026-11-24",
        "1:30:00",
        "'",
        '"',
        "[",
        "{",
        "*x",
        "&x y",
        "|",
        ">",
    ),
    *(
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!x y",
    ),
    *("!!set {a}", "!!omap [a: 1]", "!!timestamp 2026-11-24", "!!int x", "!!float x", "!!map []"),
    *(
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "\u202e",
        "\x85",
        "\ufeff",
    ),
    *("../../etc/passwd", "/dev/zero", "/proc/self/mem", "os:system", "a" * 100_000, "%n%s{0}"),
    *("[[[[[]]]]]", "{a: {b: {c: 1}}}", "[1, 'two', null, {}]", "{<<: [1]}", "<<", "0o17", "1_000"),
)
DEEP = "[" * 3000 + "]" * 3000
BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(30))


def bytes_damaged(data: bytes, draw: Random) -> bytes:
    """Flipped bits, lost, repeated, swapped or foreign stretches, a cut end."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        if not damaged:
            break
        start = draw.randrange(len(damaged))
        stop = min(len(damaged), start + draw.choice((1, 2, 8, 64, 600)))
        kind = draw.randrange(6)
        if kind == 0:
            damaged[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del damaged[start:stop]
        elif kind == 2:
            damaged[start:start] = damaged[start:stop]
        elif kind == 3:
            damaged[start:stop] = draw.randbytes(stop - start)
        elif kind == 4:
            damaged[start:stop] = bytes([draw.choice((0, 255, 32, 48))]) * (stop - start)
        else:
            del damaged[start if draw.random() < 0.3 else len(damaged) :]
    return bytes(damaged)


def text_damaged(text: str, others: list[str], draw: Random) -> bytes:
    """Lines lost, repeated, moved, indented or taken from elsewhere; values replaced by strange ones; or just bytes."""
    if draw.random() < 0.15:
        return bytes_damaged(text.encode(), draw)
    lines = text.split("\n")
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(lines))
        kind = draw.randrange(10)
        key, colon, value = lines[at].partition(":")
        if kind <= 3 and colon:
            lines[at] = f"{key}: {draw.choice(SCALARS)}"
        elif kind == 4 and colon and "," in value:
            parts = value.split(",")
            part = draw.randrange(len(parts))
            name, inner, _ = parts[part].partition(":")
            parts[part] = f"{name}{inner} {draw.choice(SCALARS)}"
            lines[at] = f"{key}:{','.join(parts)}"
        elif kind == 5:
            lines.insert(at, draw.choice(draw.choice(others).split("\n")))
        elif kind == 6:
            lines.insert(draw.randrange(len(lines)), lines.pop(at))
        elif kind == 7:
            lines[at] = draw.choice((" ", "  ", "\t", "- ", "? ", "# ", "<<: ")) + lines[at]
        elif kind == 8:
            del lines[at]
            lines = lines or [""]
        else:
            lines.insert(
                at, draw.choice((lines[at], "---", "...", "%YAML 1.1", BOMB, f"x: {DEEP}"))
            )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def json_damaged(value: Any, draw: Random) -> Any:
    """One value somewhere in a JSON tree replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = dict(value)
        kind = draw.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[draw.choice(("", "x", "../x", "a" * 1000, "__metadata__", "\0", "é"))] = (
                changed.pop(key)
            )
        else:
            changed[key] = json_damaged(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], json_damaged(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return draw.choice(
            (value + 1, value - 1, -value, 0, HUGE, 2**63, 2**64, 10**40, value + 0.5)
        )
    strange = (
        None,
        True,
        -1,
        0,
        1,
        HUGE,
        1e308,
        "",
        "x",
        "../../x",
        "F64",
        "BOOL",
        "F8_E4M3",
        "a" * 5000,
    )
    return draw.choice((*strange, [], {}, [HUGE, HUGE], [0] * 100, {"a": {"b": []}}, [[[[]]]]))


def json_text_damaged(text: str, draw: Random) -> bytes:
    """A JSON text with one or more strange values, or with damaged bytes."""
    if draw.random() < 0.25:
        return bytes_damaged(text.encode(), draw)
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        value = json_damaged(value, draw)
    written = json.dumps(value, indent=draw.choice((None, 2)))
    return draw.choice((written, written, written, f"[{written}]", written * 2, DEEP)).encode()


def safetensors_damaged(data: bytes, draw: Random) -> bytes:
    """A header with strange entries, another length in front, or damaged bytes."""
    kind = draw.randrange(10)
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if kind == 0:
        return bytes_damaged(data, draw)
    if kind == 1:
        length = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, 100_000_000))
        return length.to_bytes(8, "little") + header + body
    header = bytes_damaged(header, draw) if kind == 2 else json_text_damaged(header.decode(), draw)
    return len(header).to_bytes(8, "little") + header + body


def tar_damaged(data: bytes, draw: Random) -> bytes:
    """Headers with strange fields under a right checksum, blocks lost, repeated or moved, or damaged bytes."""
    kind = draw.randrange(5)
    if kind == 0:
        return bytes_damaged(data, draw)
    if kind == 4:
        return data.replace(PNG_SIZE, png_size(draw), draw.choice((1, -1)))
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    at = draw.randrange(len(blocks))
    if kind == 1:
        move = draw.randrange(3)
        if move == 0:
            del blocks[at]
        elif move == 1:
            blocks.insert(at, draw.choice(blocks))
        else:
            blocks.insert(draw.randrange(len(blocks)), blocks.pop(at))
        return b"".join(blocks)
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.choice(headers)
        blocks[at] = header_damaged(blocks[at], draw)
    return b"".join(blocks)


def png_size(draw: Random) -> bytes:
    """The size in a PNG's header: none, a line, or far more than its pixels."""
    side = (0, 1, 16, 17, 10_000, 60_000, 2**31 - 1, 2**32 - 1)
    return b"IHDR" + b"".join(draw.choice(side).to_bytes(4, "big") for _ in range(2))


def header_damaged(block: bytes, draw: Random) -> bytes:
    """A tar header with one field replaced; its checksum is made right."""
    fields = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "kind": (156, 157)}
    fields |= {"link": (157, 257), "magic": (257, 265), "prefix": (345, 500)}
    start, stop = fields[draw.choice(list(fields))]
    choices = [b"77777777777\0", b"-1", b"", b"\x80" + b"\0" * 3 + b"\x7f" * 8, b"\xff" * 12]
    choices += [
        b"../../etc/passwd",
        b"/dev/zero",
        b"x/y.jpg",
        b"\xff\xfe.png",
        b"a.cls",
        b"00000001000\0",
    ]
    value = draw.choice(choices)
    if stop - start == 1:
        value = (
            bytes([draw.randrange(256)])
            if draw.random() < 0.3
            else draw.choice(
                [b"0", b"1", b"2", b"3", b"5", b"L", b"K", b"x", b"g", b"S", b"X", b"\0", b"7"]
            )
        )
    changed = bytearray(block)
    changed[start:stop] = value[: stop - start].ljust(stop - start, b"\0")
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)
