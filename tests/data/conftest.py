"""Shared pieces of the data tests."""

from __future__ import annotations

import json

import pytest


class Bytes:
    """Tokenizer of one id per UTF-8 byte that counts what it was asked to encode."""

    def __init__(self):
        self.characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return list(text.encode())


@pytest.fixture
def tokenizer():
    return Bytes()


@pytest.fixture
def squad_file(tmp_path):
    """Writes a SQuAD file; `change(paragraph)` may damage it first."""

    def write(change=None, passages=1, name="qa.json", **article):
        paragraphs = [
            {
                "context": f"Passage {n}: the fox is red and the hen is brown.",
                "qas": [
                    {
                        "id": f"q{n}",
                        "question": "What is the fox?",
                        "answers": [{"text": "red", "answer_start": 27}],
                    }
                ],
            }
            for n in range(passages)
        ]
        if change:
            change(paragraphs[0])
        path = tmp_path / name
        path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs} | article]}))
        return path

    return write
