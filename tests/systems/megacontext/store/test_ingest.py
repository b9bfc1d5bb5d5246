"""Text files into a store: once each, in order, resumable; and the command line around it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from latent_jax import backbones, cli
from latent_jax.core.errors import DataError, StoreError
from latent_jax.systems.megacontext.store import GistTree, TreeSpec, build, ingest
from latent_jax.systems.megacontext.store.ingest import ingest as append
from tests.systems.megacontext.store.gist_store import contents, gists_of

SPEC = TreeSpec(vocab_size=259, width=2)
TEXTS = {
    "b.txt": "Second, by its name.\n",
    "a/z.md": "# First\n\nA folder's files come before, for 'a' < 'b.txt'.\n" * 30,
    "a/ünï.txt": "Grüße\r\n",
    "c.py": "print('no newline at the end')",
}


class Bytes:
    """Tokens are bytes; can give up at a certain text."""

    def __init__(self, gives_up_at: int | None = None):
        self.calls, self.gives_up_at = 0, gives_up_at

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == self.gives_up_at:
            raise KeyboardInterrupt
        return [list(text.encode()) for text in texts]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Texts, and what is no text."""
    root = tmp_path / "texts"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "empty.txt").write_text(" \n\t")
    (root / "image.png").write_bytes(b"\x89PNG\r\n\0\0")
    (root / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    return root


def create(path: Path) -> GistTree:
    return GistTree.create(path, SPEC)


def test_each_text_once_in_the_order_of_its_path(folder, tmp_path):
    seen = []
    with create(tmp_path / "s") as tree:
        done = append(tree, Bytes(), folder, lambda *progress: seen.append(progress))
        assert (done.added, done.unchanged, done.tokens) == (4, 0, len(tree))
        reasons = dict(done.skipped)
        assert reasons.pop("latin1.txt") == "not UTF-8 text (invalid start byte at byte 2)"
        assert reasons == {
            "empty.txt": "empty",
            "gone.txt": "no regular file",
            "image.png": "binary",
        }
        assert seen[-1] == (8, 8, len(tree)) and [s[0] for s in seen] == list(range(1, 9))
        assert [d.path for d in tree.documents] == ["a/z.md", "a/ünï.txt", "b.txt", "c.py"]
        for document in tree.documents:
            text = bytes(tree.tokens(document.start, document.stop).tolist())
            assert text == TEXTS[document.path].encode()
            assert document.sha256 == hashlib.sha256(text).hexdigest()
        assert append(tree, Bytes(), folder).unchanged == 4
        (folder / "b.txt").write_text("Changed.")
        again = append(tree, Bytes(), folder)
        assert (again.added, again.unchanged, again.tokens) == (1, 3, 8)
        assert tree.documents[-1][2:] == (len(tree) - 8, len(tree))
        assert append(tree, Bytes(), folder / "b.txt").unchanged == 1  # one file


@pytest.mark.parametrize("gives_up_at", [1, 2, 3, 4])
def test_an_interrupted_ingest_continues_to_the_same_store(
    folder, tmp_path, gives_up_at, monkeypatch
):
    with create(tmp_path / "whole") as tree:
        append(tree, Bytes(), folder)
    monkeypatch.setattr(ingest, "_FLUSH_EVERY", 1)
    with pytest.raises(KeyboardInterrupt), create(tmp_path / "torn") as tree:
        append(tree, Bytes(gives_up_at), folder)
    with GistTree.open(tmp_path / "torn", writable=True) as tree:
        assert len(tree.documents) == gives_up_at - 1  # whole documents, nothing of the next
        assert len(tree) == max((d.stop for d in tree.documents), default=0)
        assert append(tree, Bytes(), folder).added == 5 - gives_up_at
        torn = tree.documents
    with GistTree.open(tmp_path / "whole") as tree:
        assert tree.documents == torn
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_long_texts_are_cut_for_the_tokenizer_and_joined_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_PIECE", 10)
    text = "one two\nthree four five six seven\n\n\neight" + "x" * 25
    pieces = list(ingest._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 10 and pieces[0] == "one two\n"
    (tmp_path / "t.txt").write_text(text)
    with create(tmp_path / "s") as tree:
        append(tree, Bytes(), tmp_path / "t.txt")
        assert bytes(tree.tokens().tolist()) == text.encode()


def test_a_store_inside_the_directory_is_left_out(folder):
    with create(folder / "store") as tree:
        append(tree, Bytes(), folder)
        assert append(tree, Bytes(), folder).added == 0
        assert not [d for d in tree.documents if "store" in d.path]


def test_nothing_to_ingest(tmp_path):
    with create(tmp_path / "s") as tree:
        with pytest.raises(DataError, match="no such directory"):
            append(tree, Bytes(), tmp_path / "nowhere")
        (tmp_path / "bare").mkdir()
        with pytest.raises(DataError, match="no files in it"):
            append(tree, Bytes(), tmp_path / "bare")


def test_a_wrong_tokenizer_adds_nothing(folder, tmp_path):
    class Wrong:
        def encode_batch(self, texts):
            return [[5, 400]]

    path = tmp_path / "s"
    with pytest.raises(StoreError, match="token id 400"), create(path) as tree:
        append(tree, Wrong(), folder)
    with GistTree.open(path) as tree:
        assert len(tree) == 0 and tree.documents == []


# The command line


def call(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["mega", *map(str, args)])
    return code, *capsys.readouterr()


def refused(capsys, *args) -> str:
    code, _, err = call(capsys, *args)
    assert code == 2 and err.startswith("latent-jax: ") and err.count("\n") == 1, err
    return err


@pytest.fixture
def store(folder, tmp_path, capsys) -> Path:
    """A store made by the command line, with the packaged tokenizer."""
    path = tmp_path / "store"
    code, out, err = call(
        capsys, "ingest", folder, "--store", path, "--backbone", "tiny", "--slots", "1,4"
    )
    assert code == 0 and "4 files added" in out and "4 skipped" in out
    assert "skipped image.png: binary" in out and "ingest: 8/8 files" in err
    return path


def test_ingest_writes_tokens_that_decode_to_the_files(store, folder):
    model = backbones.outline("tiny")
    with GistTree.open(store, tokenizer=model.tokenizer.sha256, base=model.sha256) as tree:
        assert tree.spec.width == model.config.hidden_size and tree.spec.slots == (1, 4)
        assert tree.version == "" and len(tree.pending(1)) == tree.count(1) > 0
        document = tree.documents[0]
        text = model.tokenizer.decode(tree.tokens(document.start, document.stop).tolist())
        assert text == TEXTS["a/z.md"]


def test_ingest_again_adds_nothing(store, folder, capsys):
    before = contents(store)
    code, out, err = call(
        capsys, "ingest", folder, "--store", store, "--backbone", "tiny", "--quiet"
    )
    assert code == 0 and "0 files added" in out and "4 already there" in out and not err
    assert contents(store) == before


def test_info_and_verify(store, capsys):
    with GistTree.open(store, writable=True) as tree:
        tree.set_version("v1")
        build(tree, gists_of(tree.spec))
        levels = tree.levels
    code, out, _ = call(capsys, "info", store, "--verify")
    assert code == 0 and "no damage" in out and "1, 4 slots of" in out and levels >= 1
    data = bytearray((store / "level1.bin").read_bytes())
    data[5] ^= 1
    (store / "level1.bin").write_bytes(data)
    (store / "meta.json").unlink()
    code, out, err = call(capsys, "info", store, "--verify")
    assert code == 2 and err.count("\n") == 1 and "damaged in 2 places" in err
    assert "damage: level 1: gists 0 to 0 are damaged" in out and "meta.json is missing" in out
    code, out, _ = call(capsys, "info", store)
    assert code == 0 and "damage: meta.json is missing" in out


def test_bad_input_is_one_line(store, folder, tmp_path, capsys):
    tiny = ("--backbone", "tiny")
    new = tmp_path / "new"
    assert "no such directory" in refused(capsys, "ingest", tmp_path / "x", "--store", new, *tiny)
    assert "--slots" in refused(capsys, "ingest", folder, "--store", new, "--slots", "a", *tiny)
    assert "dtype='f8'" in refused(capsys, "ingest", folder, "--store", new, "--dtype", "f8", *tiny)
    assert "no such model" in refused(capsys, "ingest", folder, "--store", new, "--backbone", "q")
    assert not new.exists()
    assert "Missing option" in refused(capsys, "ingest", folder)
    width = ("--width", 9, *tiny)
    assert "but 9 is wanted" in refused(capsys, "ingest", folder, "--store", store, *width)
    other = tmp_path / "other"
    create(other).close()
    said = refused(capsys, "ingest", folder, "--store", other, *tiny)
    assert "made with tokenizer (none), but" in said
    assert "other files" in refused(capsys, "ingest", folder, "--store", folder, *tiny)
    assert "no such store" in refused(capsys, "info", new)
    assert "not a store" in refused(capsys, "info", folder)
    with GistTree.open(store, writable=True):
        said = refused(capsys, "ingest", folder, "--store", store, *tiny)
        assert "is writing to this store" in said
        assert call(capsys, "info", store, "--verify")[0] == 0


def test_the_outline_of_a_model_is_what_load_says():
    model, loaded = backbones.outline("tiny"), backbones.load("tiny")
    assert model.sha256 == loaded.sha256 and model.config == loaded.config
    assert model.tokenizer.sha256 == loaded.tokenizer.sha256


def test_the_outline_of_a_gguf_file(smollm2_path):
    found = backbones.outline("smollm2")
    assert found.config.hidden_size == 576 and found.tokenizer.vocab_size == 49152
    assert found.sha256 == hashlib.sha256(smollm2_path.read_bytes()).hexdigest()


def test_the_outline_of_a_llama2c_file(data_root):
    path = data_root / "models" / "stories260K.bin"
    if not path.is_file():
        pytest.skip("the llama2.c model is not there")
    found, loaded = backbones.outline(path), backbones.load(path)
    assert (found.sha256, found.config) == (loaded.sha256, loaded.config)
