"""Reading the kernel's table of mounts."""

from __future__ import annotations

from corral.sandbox.mounts import mount_points, mounted_below, unescape


def test_names_with_the_characters_that_the_kernel_escapes() -> None:
    assert unescape(r"/a\040b\011c\012d\134e") == "/a b\tc\nd\\e"
    assert unescape("/plain") == "/plain"


def test_below_is_strictly_below_and_by_whole_names() -> None:
    points = ["/", "/home", "/home/me", "/home/me/work space/sub", "/home/mean"]
    assert mounted_below("/home/me", points) == ["/home/me/work space/sub"]
    assert mounted_below("/home/me/work space", points) == ["/home/me/work space/sub"]
    assert mounted_below("/home/me/work", points) == []


def test_this_machine_has_proc_mounted() -> None:
    assert "/proc" in mount_points()
    assert "/proc" in mounted_below("/")
