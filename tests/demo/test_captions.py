import pytest

from qs_compiler.demo.captions import COLOURS, DIRECTIONS, EXAMPLE, SHAPES, Caption, CaptionError, is_held_out
from qs_compiler.demo.data import draw_scenes
from qs_compiler.demo.text import MAX_TOKENS, WORDS, CaptionEncoder, tokenize


def test_a_caption_reads_as_a_sentence_and_back():
    assert str(EXAMPLE) == "a large red circle moves right over navy waves with a yellow square"
    for caption in draw_scenes(200, seed=3).captions():
        assert Caption.parse(str(caption).upper()) == caption


@pytest.mark.parametrize(
    "text", ["a dog", "a red circle moves right", "a large red circle moves north over navy waves"]
)
def test_an_unreadable_caption_shows_the_grammar(text):
    with pytest.raises(CaptionError, match="For instance: a large red circle"):
        Caption.parse(text)


def test_one_triple_in_six_is_held_out_and_every_word_is_still_seen():
    triples = [(c, s, d) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for d in range(len(DIRECTIONS))]
    seen = [t for t in triples if not is_held_out(*t)]
    assert len(triples) - len(seen) == len(triples) // 6
    for first, second in ((0, 1), (0, 2), (1, 2)):  # each pair too: only triples are new
        assert {(t[first], t[second]) for t in seen} == {(t[first], t[second]) for t in triples}


def test_tokens_tell_captions_apart_and_pad_with_zero():
    tokens = tokenize(["", EXAMPLE])
    assert tokens.shape == (2, MAX_TOKENS)
    assert tokens[0].eq(0).all()
    assert [WORDS[i] for i in tokens[1].tolist() if i] == str(EXAMPLE).split()


def test_an_unknown_word_is_named():
    with pytest.raises(CaptionError, match=r"unknown words in .*: orange"):
        tokenize(["a large orange circle"])


def test_word_order_reaches_the_encoding():
    encoder = CaptionEncoder(16)
    one, other = encoder.encode(["red blue", "blue red"])
    assert one.shape == (MAX_TOKENS, 16)
    assert not one.sort(0).values.allclose(other.sort(0).values)
