"""Hostile JSON for every format that is one file: what is no value of it, whatever the format."""

from __future__ import annotations

#: What is wrong → the text. None of them is read: each ends in one line.
DOCUMENTS = {
    "nothing": "",
    "no object": "[]",
    "cut short": '{"format": 1, "tor',
    "brackets without end": '{"later": ' + "[" * 100_000,
    "objects without end": '{"later": ' + '{"a":' * 100_000,
    "not a number": '{"format": 1, "later": NaN}',
    "no text": '{"format": 1, "later": "\\ud800',
    "format as a text": '{"format": "1"}',
    "no format": "{}",
    "format without end": '{"format": ' + "9" * 5000 + "}",
}
