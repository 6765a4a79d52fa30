import unittest

from intervals import gaps, merge, total


class MergeTest(unittest.TestCase):
    def test_apart(self) -> None:
        self.assertEqual(merge([(5, 6), (1, 2)]), [(1, 2), (5, 6)])

    def test_touching(self) -> None:
        self.assertEqual(merge([(1, 2), (2, 3)]), [(1, 3)])

    def test_overlapping(self) -> None:
        self.assertEqual(merge([(1, 4), (3, 6)]), [(1, 6)])

    def test_empty(self) -> None:
        self.assertEqual(merge([(3, 3), (9, 1)]), [])

    def test_nested(self) -> None:
        self.assertEqual(merge([(1, 10), (2, 3)]), [(1, 10)])


class SumTest(unittest.TestCase):
    def test_total_counts_once(self) -> None:
        self.assertEqual(total([(0, 60), (15, 30), (45, 90)]), 90)

    def test_gaps(self) -> None:
        self.assertEqual(gaps([(0, 60), (90, 120), (10, 20)]), [(60, 90)])
