"""The first line of a script, as the kernel reads it."""

from __future__ import annotations

import pytest

from corral.supervisor.invocation import Script, as_name, read_script


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"#!/bin/sh\nrest", Script(b"/bin/sh", None)),
        (b"#! \t/bin/sh \t -e  -x \t\nrest", Script(b"/bin/sh", b"-e  -x")),
        (b"#!/bin/sh", Script(b"/bin/sh", None)),
        (b"#!/bin/sh\r\n", Script(b"/bin/sh\r", None)),
        (b"#!/bin/sh\0-e\n", Script(b"/bin/sh", None)),
        (b"#!\n", Script(b"", None)),
        (b" #!/bin/sh\n", None),
        (b"\x7fELF", None),
        (b"", None),
    ],
)
def test_the_first_line_is_read_as_the_kernel_reads_it(start: bytes, expected: Script | None) -> None:
    assert read_script(start) == expected


@pytest.mark.parametrize(
    ("path", "directory", "expected"),
    [
        (b"/bin/x", 5, b"/bin/x"),
        (b"x", -100, b"x"),
        (b"x", 5, b"/dev/fd/5/x"),
        (b"", 5, b"/dev/fd/5"),
    ],
)
def test_a_script_is_named_as_the_kernel_names_it(path: bytes, directory: int, expected: bytes) -> None:
    assert as_name(path, directory, -100) == expected
