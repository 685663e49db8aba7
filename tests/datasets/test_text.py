from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editeval.datasets.text import contains_answer, is_word_character, normalize_answer, starts_with_answer

# Some letters stand for a letter and a mark (U+013F for L and a middle dot): words must begin and end in word characters once unfolded.
WORDS = st.text(st.characters(codec="utf-8", categories=("Lu", "Ll", "Nd")), min_size=1, max_size=8).filter(
    lambda word: is_word_character(normalize_answer(word)[0]) and is_word_character(normalize_answer(word)[-1])
)
PHRASES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@given(st.text())
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@given(PHRASES, st.sampled_from([" ", "\t", "\n", "\u00a0", "  \n "]))
def test_kind_and_amount_of_white_space_do_not_count(phrase: str, space: str) -> None:
    assert normalize_answer(space + phrase.replace(" ", space) + space) == normalize_answer(phrase)


@given(PHRASES)
def test_case_as_unicode_folds_it_does_not_count(phrase: str) -> None:
    assert starts_with_answer(phrase, phrase.casefold())
    assert starts_with_answer(phrase.casefold(), phrase)


@given(st.text("abcdefghijklmnopqrstuvwxyzäöüßéèñçøåæ 0123456789", min_size=1).filter(str.strip))
def test_capitals_do_not_count(phrase: str) -> None:
    assert starts_with_answer(phrase.upper(), phrase)
    assert starts_with_answer(phrase, phrase.upper())
    assert starts_with_answer(phrase.title(), phrase)


def test_letters_that_only_some_languages_pair_stay_apart() -> None:
    assert not starts_with_answer("I", "\u0131"), "Turkish dotless i is another letter than i"


@given(PHRASES, st.sampled_from(["", ".", ", and", " or so", "'s", "-", "\nNext", "!", ")"]))
def test_an_answer_before_a_boundary_is_found(phrase: str, rest: str) -> None:
    assert starts_with_answer(" " + phrase + rest, phrase)
    assert contains_answer("Well: " + phrase + rest, phrase)


@given(PHRASES, WORDS)
def test_an_answer_inside_a_longer_word_is_not_found(phrase: str, more: str) -> None:
    assert not starts_with_answer(phrase + more, phrase)


@given(st.text(max_size=40), PHRASES)
def test_what_starts_with_an_answer_contains_it(generated: str, answer: str) -> None:
    for text in (generated, answer + generated, answer + " " + generated):
        if starts_with_answer(text, answer):
            assert contains_answer(text, answer)


@given(st.text(max_size=40))
def test_an_empty_answer_is_never_found(generated: str) -> None:
    for empty in ("", " ", "\n\t"):
        assert not starts_with_answer(generated, empty)
        assert not contains_answer(generated, empty)


@pytest.mark.parametrize(
    ("generated", "answer", "starts", "contains"),
    [
        (" Paris, the capital", "Paris", True, True),
        ("the city of Paris.", "Paris", False, True),
        (" Parisian streets", "Paris", False, False),
        ("comparison", "paris", False, False),
        ('"Paris"', "paris", True, True),
        (" **Paris** is", "Paris", True, True),
        ("‘Paris’", "Paris", True, True),
        ("ＰＡＲＩＳ", "paris", True, True),
        ("STRASSE 5", "Straße", True, True),
        ("Cafe\u0301", "Caf\u00e9", True, True),
        ("Cafe\u0301", "Cafe", False, False),
        ("1998", "19", False, False),
        ("3.5 km", "3", False, False),
        ("3. Then", "3", True, True),
        ("it is 1,000", "1", False, False),
        ("it is 1,000", "000", False, False),
        ("France's", "France", True, True),
        ("New\n York", "new york", True, True),
        ("C++ and C", "C++", True, True),
        ('"C" is', '"C"', True, True),
        ("No, Parisian Paris", "Paris", False, True),
        ("", "Paris", False, False),
    ],
)
def test_answers_are_found_where_a_reader_would_find_them(generated: str, answer: str, starts: bool, contains: bool) -> None:
    assert starts_with_answer(generated, answer) is starts
    assert contains_answer(generated, answer) is contains


def test_marks_that_belong_to_a_letter_are_part_of_the_word() -> None:
    assert is_word_character("\u0301")
    assert not is_word_character("-")
