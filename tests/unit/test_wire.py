"""Both sides of the wire: Python writes plans and requests, C reads them, and their numbers and layouts are the same.

The headers are read as text, sizes and offsets come from the compiler, and the parsers run as they are, under
AddressSanitizer and UndefinedBehaviorSanitizer, with what the fuzzers (tests/fuzz) check of every accepted input.
"""

from __future__ import annotations

import re
import runpy
import shutil
import struct
import subprocess
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.sandbox import channel, plan
from corral.sandbox.channel import encode_exec
from corral.sandbox.plan import Attribute, IdLine, Idmap, Lower, Map, Origin, Plan

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "src" / "launcher"
FUZZ = ROOT / "tests" / "fuzz"
FLAGS = ["-std=c11", "-D_GNU_SOURCE=", "-g", "-O1", f"-I{LAUNCHER}"]
SANITIZE = ["-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# ---- numbers ----


def header(name: str) -> str:
    """A header without its comments."""
    return re.sub(r"/\*.*?\*/", "", (LAUNCHER / name).read_text(), flags=re.DOTALL)


def c_enums(name: str) -> dict[str, dict[str, int]]:
    """Each enum of a header, by its tag ("" for the one without)."""
    found = {}
    for tag, body in re.findall(r"\benum\s*(\w*)\s*\{([^}]*)\}", header(name)):
        values: dict[str, int] = {}
        following = 0
        for entry in filter(None, map(str.strip, body.split(","))):
            constant, _, number = map(str.strip, entry.partition("="))
            following = int(number, 0) if number else following
            values[constant] = following
            following += 1
        found[tag] = values
    return found


def c_define(name: str, constant: str) -> int:
    match = re.search(rf"#define {constant} \(?(0x[0-9a-f]+|\d+)u?(?: << (\d+))?\)?", header(name))
    assert match, constant
    return int(match[1], 0) << int(match[2] or 0)


@pytest.mark.parametrize(
    ("mirror", "file", "tag", "prefix"),
    [
        (plan.Kind, "plan.h", "step_kind", "STEP_"),
        (plan.Map, "plan.h", "id_map_use", "MAP_"),
        (plan.Origin, "plan.h", "bind_origin", "ORIGIN_"),
        (plan.Attribute, "plan.h", "bind_attribute", "BIND_"),
        (plan.Idmap, "plan.h", "source_idmap", "IDMAP_"),
        (channel.Request, "protocol.h", "request_type", "REQUEST_"),
        (channel.ReportType, "protocol.h", "report_type", "REPORT_"),
        (channel.EndReason, "protocol.h", "end_reason", "END_"),
    ],
)
def test_enums_are_the_same(mirror: type[IntEnum] | type[IntFlag], file: str, tag: str, prefix: str) -> None:
    theirs = {name.removeprefix(prefix): value for name, value in c_enums(file)[tag].items()}
    theirs.pop("COUNT", None)
    ours = {name: int(member) for name, member in mirror.__members__.items()}
    if issubclass(mirror, IntFlag):
        ours.pop("NONE")  # a flag enum of C needs no name for zero
    assert ours == theirs


def test_usage_has_the_order_of_the_report() -> None:
    names = {
        "USAGE_USER_US": "user_seconds",
        "USAGE_SYSTEM_US": "system_seconds",
        "USAGE_MAXRSS_KIB": "max_rss",
        "USAGE_MINOR_FAULTS": "minor_faults",
        "USAGE_MAJOR_FAULTS": "major_faults",
        "USAGE_BLOCKS_IN": "blocks_in",
        "USAGE_BLOCKS_OUT": "blocks_out",
        "USAGE_SWITCHES": "context_switches",
    }
    theirs = c_enums("protocol.h")[""]
    assert theirs.pop("USAGE_COUNT") == len(channel.Usage._fields) == len(theirs)
    assert tuple(names[name] for name, _ in sorted(theirs.items(), key=lambda item: item[1])) == channel.Usage._fields


def test_constants_are_the_same() -> None:
    assert c_define("protocol.h", "CONTROL_FD") == channel.CONTROL_FD
    assert c_define("protocol.h", "EXEC_SESSION_MARK") == channel.EXEC_SESSION_MARK
    assert c_define("plan.h", "PLAN_MAX_BYTES") == plan.MAX_BYTES
    assert c_define("exec.h", "EXEC_MAX_BYTES") == channel.MAX_EXEC_BYTES
    assert c_define("report.h", "MESSAGE_MAX_FDS") == channel._MAX_FDS
    # READY carries the root, the layer and the listeners; the keeper hands over every source in one message.
    assert c_define("plan.h", "PLAN_MAX_LISTENERS") + 2 <= channel._MAX_FDS
    assert c_define("plan.h", "PLAN_MAX_SOURCES") <= channel._MAX_FDS


# ---- layouts ----


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        pytest.skip("no C compiler (cc) on this machine; `make test` as root installs one")
    return found


def compile_c(compiler: str, *arguments: str | Path) -> None:
    done = subprocess.run([compiler, *FLAGS, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_structs_have_the_layout_that_python_packs(compiler: str, tmp_path: Path) -> None:
    fields = {
        "request": ["type", "id", "argument", "reserved"],
        "report": ["type", "id", "status", "error", "values", "step", "detail"],
    }
    prints = "".join(
        f'printf("%zu ", sizeof(struct {name})); '
        + "".join(f'printf("%zu ", offsetof(struct {name}, {field})); ' for field in names)
        + 'puts("");'
        for name, names in fields.items()
    )
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "protocol.h"\nint main(void) {{ {prints} return 0; }}\n'
    )
    compile_c(compiler, "-Wall", "-Werror", source, "-o", tmp_path / "layout")
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    request, report = ([int(number) for number in line.split()] for line in printed.splitlines())

    assert request == [channel._REQUEST.size, 0, 4, 8, 12]
    assert channel._REQUEST.format == "<IIII"
    assert report == [channel._REPORT.size, 0, 4, 8, 12, 16, 80, 128]
    assert [struct.calcsize(part) for part in ("<IIii", "<IIii8Q", "<IIii8Q48s")] == [16, 80, 128]
    assert channel._REPORT.format == "<IIii8Q48s208s"


# ---- parsers ----

CHECKER = r"""
#include <stdio.h>
#include <stdlib.h>
#include "exec.h"
#include "plan.h"

int fuzz_plan(const uint8_t *data, size_t size);
int fuzz_exec(const uint8_t *data, size_t size);

static struct plan plan;

int main(void)
{
    char kind;
    uint32_t size;
    while (fread(&kind, 1, 1, stdin) == 1 && fread(&size, sizeof size, 1, stdin) == 1) {
        uint8_t *data = malloc(size); /* of exactly this size, so that one byte too many is seen */
        struct exec exec;
        if (size > 0 && fread(data, size, 1, stdin) != 1)
            return 1;
        (kind == 'p' ? fuzz_plan : fuzz_exec)(data, size);
        const char *problem = kind == 'p' ? plan_parse(&plan, data, size) : exec_parse(&exec, data, size);
        if (problem) {
            printf("refused %s\n", problem);
        } else if (kind == 'p') {
            printf("accepted %u %u %u %u\n", plan.count, plan.sources, plan.listeners, plan.cgroups);
        } else {
            printf("accepted %u %u\n", exec.flags, exec.limits);
            exec_free(&exec);
        }
        fflush(stdout);
        free(data);
    }
    return 0;
}
"""


class Checker:
    """The C parsers in a process of their own; a fault in them ends it, and then asking raises."""

    def __init__(self, program: Path, errors: Path) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env={}
            )

    def _ask(self, kind: bytes, content: bytes) -> str:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(kind + struct.pack("=I", len(content)) + content)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline().decode("utf-8").rstrip("\n")
        assert answer, f"the parser died: {self._errors.read_text()[-4000:]}"
        return answer

    def plan(self, content: bytes) -> str:
        return self._ask(b"p", content)

    def exec(self, content: bytes) -> str:
        return self._ask(b"e", content)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0, self._errors.read_text()[-4000:]


@pytest.fixture(scope="session")
def checker(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checker]:
    place = tmp_path_factory.mktemp("wire")
    source, program = place / "checker.c", place / "checker"
    source.write_text(CHECKER)
    objects = []
    for name in ("plan", "exec"):
        target = place / f"fuzz_{name}.o"
        define = f"-DLLVMFuzzerTestOneInput=fuzz_{name}"
        compile_c(compiler, *SANITIZE, define, "-c", FUZZ / f"fuzz_{name}.c", "-o", target)
        objects.append(target)
    parsers = [LAUNCHER / f"{name}.c" for name in ("plan", "exec", "wire")]
    compile_c(compiler, *SANITIZE, source, *objects, *parsers, "-o", program)
    found = Checker(program, place / "stderr")
    yield found
    found.close()


# What Python hands over: any characters but NUL, and bytes that are no UTF-8 as surrogates (os.fsdecode).
texts = st.text(
    st.one_of(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    ),
    max_size=40,
)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
lines = st.lists(st.builds(IdLine, u32, u32, u32), min_size=1, max_size=8)


class Counts(NamedTuple):
    """What a plan's reader must have counted."""

    steps: int = 0
    sources: int = 0
    listeners: int = 0
    cgroups: int = 0


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, Counts]:
    """Any plan that Plan's methods can build and the launcher's limits allow."""
    made = Plan()
    made.id_map(Map.SANDBOX_UID, draw(lines), become=draw(u32), helper=draw(texts))
    made.id_map(Map.SANDBOX_GID, draw(lines), become=draw(u32), helper=draw(texts))
    sources = listeners = cgroups = 0
    steps = 2
    if draw(st.booleans()):
        made.id_map(Map.WORKSPACE_UID, draw(lines))
        made.id_map(Map.WORKSPACE_GID, draw(lines))
        steps += 2
    idmaps = st.sampled_from(Idmap)
    pairs = st.lists(st.tuples(texts, texts), max_size=5)
    for kind in draw(st.lists(st.sampled_from(plan.Kind), max_size=24)):
        if kind is plan.Kind.ID_MAP:
            continue
        steps += 1
        if kind is plan.Kind.CGROUP:
            if cgroups == 8:
                steps -= 1
                continue
            made.cgroup(draw(st.sampled_from([1, 2])), draw(texts), draw(pairs))
            cgroups += 1
        elif kind is plan.Kind.WALL_TIME:
            made.wall_time(draw(st.floats(0, 1e9)))
        elif kind is plan.Kind.REMOVE:
            made.remove(draw(texts))
        elif kind is plan.Kind.PREPARE:
            made.prepare_outside()
        elif kind is plan.Kind.LAYER:
            made.layer(draw(u64), draw(u64))
        elif kind is plan.Kind.LAYER_DIR:
            made.layer_directory(draw(texts), draw(u32), draw(u32), draw(u32))
        elif kind is plan.Kind.ROOT:
            made.root(draw(u64), draw(u64))
        elif kind is plan.Kind.DIRECTORY:
            made.directory(draw(texts), draw(u32))
        elif kind is plan.Kind.SYMLINK:
            made.symlink(draw(texts), draw(texts))
        elif kind is plan.Kind.FILE:
            made.file(draw(texts), draw(st.binary(max_size=100)), draw(u32))
        elif kind is plan.Kind.OVERLAY:
            lowers = draw(st.lists(st.builds(Lower, texts, idmaps), min_size=1, max_size=10))
            made.overlay(draw(texts), draw(texts), draw(texts), lowers)
            sources += len(lowers)
        elif kind is plan.Kind.BIND:
            origin = draw(st.sampled_from(Origin))
            attributes = Attribute(draw(st.integers(0, 7)))
            if origin is not Origin.HOST:
                attributes &= ~Attribute.DEVICES
            made.bind(draw(texts), draw(texts), origin=origin, attributes=attributes, idmap=draw(idmaps))
            sources += origin is Origin.HOST
        elif kind is plan.Kind.PROC:
            made.proc(draw(texts), draw(texts))
        elif kind is plan.Kind.DEVPTS:
            made.devpts(draw(texts), draw(texts))
        elif kind is plan.Kind.SYSCTL:
            made.sysctl(draw(texts), draw(texts))
        elif kind is plan.Kind.MQUEUE:
            made.mqueue(draw(texts))
        elif kind is plan.Kind.HOSTNAME:
            made.hostname(draw(texts))
        elif kind is plan.Kind.SEAL_ROOT:
            made.seal_root()
        elif kind is plan.Kind.PIVOT:
            made.pivot()
        elif kind is plan.Kind.LOOPBACK:
            made.loopback()
        elif kind is plan.Kind.LISTEN:
            made.listen(draw(texts), draw(st.integers(1, 65535)), draw(u32))
            listeners += 1
        elif kind is plan.Kind.DATAGRAM:
            made.datagram(draw(texts), draw(st.integers(1, 65535)))
            listeners += 1
        elif kind is plan.Kind.NETLINK:
            made.netlink(
                draw(st.sampled_from([0, 12])), draw(st.binary(min_size=1, max_size=100)), draw(st.integers(1, 64))
            )
        elif kind is plan.Kind.RLIMIT:
            made.rlimit(draw(u32), draw(u64))
        elif kind is plan.Kind.LANDLOCK:
            made.landlock(draw(u64), draw(u64), draw(u64), draw(st.lists(st.tuples(u64, texts), max_size=5)))
        elif kind is plan.Kind.FILTER:
            made.filter(bytes(8 * draw(st.integers(1, 20))))
        elif kind is plan.Kind.AFFINITY:
            made.affinity(draw(st.lists(st.integers(0, 1023), min_size=1, max_size=5)))
        else:
            pytest.fail(f"this test does not know {kind!r}")
    return made, Counts(steps, sources, listeners, cgroups)


execs = st.builds(
    lambda first, rest, env, directory, uid, gid, terminal, limits: encode_exec(
        [first, *rest], env, directory, uid, gid, terminal=terminal, limits=limits
    ),
    texts.filter(bool),
    st.lists(texts, max_size=8),
    st.dictionaries(texts, texts, max_size=8),
    texts,
    u32,
    u32,
    st.booleans(),
    st.lists(st.tuples(u32, u64, u64), max_size=16),
)


@settings(deadline=None, max_examples=300)
@given(plans())
def test_every_plan_that_python_can_write_is_accepted(checker: Checker, made: tuple[Plan, Counts]) -> None:
    written, counts = made
    assert checker.plan(written.compile()) == "accepted " + " ".join(map(str, counts))


@settings(deadline=None, max_examples=300)
@given(execs)
def test_every_exec_that_python_can_write_is_accepted(checker: Checker, written: bytes) -> None:
    assert checker.exec(written).startswith("accepted")


@settings(deadline=None, max_examples=300)
@given(st.data(), plans(), execs)
def test_damaged_input_is_refused_or_read_safely(
    checker: Checker, data: st.DataObject, made: tuple[Plan, Counts], written: bytes
) -> None:
    for content, ask in ((made[0].compile(), checker.plan), (written, checker.exec)):
        cut = data.draw(st.integers(0, len(content) - 1))
        assert ask(content[:cut]).startswith("refused")
        assert ask(content + b"\0").startswith("refused")
        flipped = bytearray(content)
        for position in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=8)):
            flipped[position // 8] ^= 1 << position % 8
        assert ask(bytes(flipped)).split(" ")[0] in ("refused", "accepted")


def base() -> Plan:
    made = Plan()
    made.id_map(Map.SANDBOX_UID, [IdLine(0, 0, 1)])
    made.id_map(Map.SANDBOX_GID, [IdLine(0, 0, 1)])
    return made


def too_many_sources(made: Plan) -> None:
    for _ in range(241):
        made.bind("/a", "/a")


def too_many_listeners(made: Plan) -> None:
    for port in range(1, 34):
        made.listen("127.0.0.1", port)


def too_many_datagrams(made: Plan) -> None:
    for port in range(1, 33):
        made.listen("127.0.0.1", port)
    made.datagram("127.0.0.1", 33)


def too_many_cgroups(made: Plan) -> None:
    for _ in range(9):
        made.cgroup(2, "/a", [])


def too_many_steps(made: Plan) -> None:
    for _ in range(1023):
        made.pivot()


@pytest.mark.parametrize(
    ("spoil", "answer"),
    [
        (too_many_sources, "plan: too many sources"),
        (too_many_listeners, "listen: too many"),
        (too_many_datagrams, "listen: too many"),
        (too_many_cgroups, "cgroup: too many"),
        (too_many_steps, "plan: wrong length or too many steps"),
        (lambda made: made.id_map(Map.SANDBOX_UID, [IdLine(0, 0, 1)]), "id map: unknown or repeated map"),
        (lambda made: made.id_map(Map.WORKSPACE_UID, [IdLine(0, 0, 1)]), "plan: workspace id maps come in pairs"),
        (lambda made: made.id_map(Map.WORKSPACE_UID, []), "id map: wrong number of lines"),
        (lambda made: made.cgroup(3, "/a", []), "cgroup: version must be 1 or 2"),
        (lambda made: made.cgroup(2, "/a", [("a", "b")] * 65), "too many settings"),
        (lambda made: made.overlay("/a", "u", "w", []), "overlay: wrong number of lower directories"),
        (lambda made: made.overlay("/a", "u", "w", [Lower("/")] * 13), "overlay: wrong number of lower directories"),
        (
            lambda made: made.bind("a", "/a", origin=Origin.LAYER, attributes=Attribute.DEVICES),
            "bind: devices come from the host only",
        ),
        (lambda made: made.listen("127.0.0.1", 0), "listen: unknown family or port"),
        (lambda made: made.listen("127.0.0.1", 65536), "listen: unknown family or port"),
        (lambda made: made.datagram("::", 0), "listen: unknown family or port"),
        (lambda made: made.datagram("::", 65536), "listen: unknown family or port"),
        (lambda made: made.netlink(1, b"x", 1), "netlink: unknown protocol"),
        (lambda made: made.netlink(9, b"x", 1), "netlink: unknown protocol"),
        (lambda made: made.netlink(0, b"x", 0), "netlink: wrong number of acknowledgements"),
        (lambda made: made.netlink(12, b"x", 65), "netlink: wrong number of acknowledgements"),
        (lambda made: made.netlink(0, b"", 1), "netlink: no messages, or too many"),
        (lambda made: made.netlink(0, bytes(16385), 1), "netlink: no messages, or too many"),
        (lambda made: made.landlock(0, 0, 0, [(0, "/")] * 257), "landlock: too many rules"),
        (lambda made: made.filter(b""), "seccomp filter: not a BPF program"),
        (lambda made: made.filter(b"1234567"), "seccomp filter: not a BPF program"),
        (lambda made: made.filter(bytes(8 * 4097)), "seccomp filter: not a BPF program"),
        (lambda made: made.affinity([]), "affinity: wrong number of processors"),
        (lambda made: made.affinity([1024]), "affinity: no such processor"),
        (lambda made: made._add(99), "unknown kind of step"),
        (lambda made: made._add(plan.Kind.PIVOT, b"x"), "plan: step is not of its kind's shape"),
        (lambda made: made._add(plan.Kind.HOSTNAME, b"\1\0\0\0\0\0"), "plan: step is not of its kind's shape"),
        (lambda made: made._add(plan.Kind.HOSTNAME, b"\1\0\0\0ab"), "plan: step is not of its kind's shape"),
    ],
)  # fmt: skip
def test_plans_beyond_the_limits_are_refused_by_name(checker: Checker, spoil: object, answer: str) -> None:
    made = base()
    assert callable(spoil)
    spoil(made)
    assert checker.plan(made.compile()) == f"refused {answer}"


def test_plans_need_both_id_maps(checker: Checker) -> None:
    assert checker.plan(Plan().compile()) == "refused plan: no id maps"


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"", "not an exec request of this version"),
        (b"CRLEXEC2" + bytes(40), "not an exec request of this version"),
        (b"CRLEXEC1" + struct.pack("<I", 99) + bytes(32), "wrong length"),
        (encode_exec(["a"], {}, "/", 0, 0)[:12] + b"\2" + encode_exec(["a"], {}, "/", 0, 0)[13:], "unknown flag"),
        (encode_exec(["a"], {}, "/", 0, 0, limits=[(0, 0, 0)] * 17), "malformed"),
        (encode_exec(["a"] + ["b"] * (1 << 17), {}, "/", 0, 0), "malformed"),
    ],
)
def test_execs_beyond_the_limits_are_refused(checker: Checker, content: bytes, answer: str) -> None:
    assert checker.exec(content) == f"refused {answer}"


def test_the_corpus_is_what_the_encoders_write_now() -> None:
    folders = [FUZZ / "corpus" / parser for parser in ("plan", "exec")]
    names = {path.relative_to(FUZZ / "corpus") for folder in folders for path in folder.rglob("*") if path.is_file()}
    corpus = runpy.run_path(str(FUZZ / "make_corpus.py"))
    seeds = {Path("plan") / name: make().compile() for name, make in corpus["PLANS"].items()}
    seeds |= {Path("exec") / name: content for name, content in corpus["EXECS"].items()}
    assert names == set(seeds), "run tests/fuzz/make_corpus.py"
    for name, content in seeds.items():
        assert (FUZZ / "corpus" / name).read_bytes() == content, f"{name}: run tests/fuzz/make_corpus.py"
