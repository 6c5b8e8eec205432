"""Validation of a Dataset, and its subsets."""

from dataclasses import replace

import numpy as np
import pytest

from kvision.data import DataError, Dataset


def make(train=60, test=30, classes=3):
    rng = np.random.default_rng(0)
    return Dataset(
        "made",
        rng.integers(0, 256, (train, 4, 5, 3), np.uint8),
        np.arange(train, dtype=np.int32) % classes,
        rng.integers(0, 256, (test, 4, 5, 3), np.uint8),
        np.arange(test, dtype=np.int32) % classes,
        classes=tuple("abcdefghij"[:classes]),
        source="a test",
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x_train", np.zeros((60, 4, 5, 3), np.float32), "uint8 array, got float32"),
        ("x_train", [[1]], "uint8 array, got list"),
        ("x_train", np.zeros((60, 4, 5), np.uint8), r"got shape \(60, 4, 5\)"),
        ("x_train", np.zeros((60, 4, 5, 4), np.uint8), "1 or 3"),
        ("x_train", np.zeros((59, 4, 5, 3), np.uint8), "59 images but 60 labels"),
        ("x_test", np.zeros((30, 5, 5, 3), np.uint8), r"have shape \(4, 5, 3\), test images \(5, 5, 3\)"),
        ("x_train", np.zeros((60, 0, 5, 3), np.uint8), "empty"),
        ("y_train", np.zeros(60, np.int64), "vector of int32, got int64"),
        ("y_train", np.zeros((60, 1), np.int32), "vector of int32"),
        ("y_test", np.full(30, 3, np.int32), "0 to 2, got 3 to 3"),
        ("y_test", np.full(30, -1, np.int32), "got -1 to -1"),
    ],
)
def test_an_invalid_array_raises_a_one_line_error(field, value, message):
    with pytest.raises(DataError, match=message) as caught:
        replace(make(), **{field: value})
    assert "\n" not in str(caught.value)
    assert "made (a test)" in str(caught.value)


def test_an_empty_split_raises():
    with pytest.raises(DataError, match="empty"):
        make(test=0)


def test_input_shape():
    assert make().input_shape == (4, 5, 3)


def test_select_keeps_classes_and_renumbers_them_in_the_given_order():
    whole = make()
    part = whole.select(["c", "a"])
    assert part.classes == ("c", "a")
    assert part.name == "made-2of3"
    np.testing.assert_array_equal(part.x_train[part.y_train == 0], whole.x_train[whole.y_train == 2])
    np.testing.assert_array_equal(part.x_test[part.y_test == 1], whole.x_test[whole.y_test == 0])
    assert (len(part.y_train), len(part.y_test)) == (40, 20)


@pytest.mark.parametrize("classes", [[], ["a", "a"], ["a", "z"]])
def test_select_raises_on_invalid_classes(classes):
    with pytest.raises(DataError, match="distinct classes among a, b, c"):
        make().select(classes)


def test_a_subset_is_balanced_sorted_and_reproducible():
    whole = make()
    part = whole.subset(train=20, test=9, seed=1)
    assert sorted(np.bincount(part.y_train)) == [6, 7, 7]
    assert np.bincount(part.y_test).tolist() == [3, 3, 3]
    places = [np.flatnonzero((whole.x_train == image).all((1, 2, 3))).item() for image in part.x_train]
    assert places == sorted(set(places))
    np.testing.assert_array_equal(part.y_train, whole.y_train[places])
    np.testing.assert_array_equal(part.x_train, whole.subset(train=20, test=9, seed=1).x_train)
    assert not np.array_equal(part.x_train, whole.subset(train=20, test=9, seed=2).x_train)
    assert "20 of 60" in part.source


def test_other_classes_replace_an_exhausted_class():
    whole = make()
    labels = np.where(np.arange(60) < 2, 0, 1 + np.arange(60) % 2).astype(np.int32)
    part = replace(whole, y_train=labels).subset(train=20)
    assert np.bincount(part.y_train).tolist() == [2, 9, 9]


def test_a_subset_of_all_images_is_the_data_set():
    whole = make()
    assert whole.subset() is whole
    assert whole.subset(train=600, test=300) is whole


@pytest.mark.parametrize("count", [0, -1])
def test_an_empty_subset_raises(count):
    with pytest.raises(DataError, match="at least 1"):
        make().subset(train=count)


def test_per_class_selects_equal_counts_and_keeps_the_test_images():
    whole = make()
    part = whole.per_class(4, seed=3)
    assert np.bincount(part.y_train).tolist() == [4, 4, 4]
    assert part.x_test is whole.x_test or np.array_equal(part.x_test, whole.x_test)


@pytest.mark.parametrize("count", [0, 21])
def test_per_class_raises_on_too_large_a_count(count):
    with pytest.raises(DataError, match=f"expected 1 to 20 per class, got {count}"):
        make().per_class(count)
