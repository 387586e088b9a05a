"""The command line as a user meets it: what it prints, what it refuses, and in which words."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from host_harness import splitee
from splitee import fleet, zoo
from splitee_host import boards

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.toml"

TINY = """\
name = "tiny"
rounds = 1
[model]
width = 2
[[client]]
name = "a"
board = "posix"
cut = "stem"
"""

LARGE = """\
name = "large"
[model]
width = 8
[[client]]
name = "a"
board = "qemu-m4"
cut = "layer3"
share = 0.1
[[client]]
name = "b"
"""


def written(text: str, name: str = "fleet.toml") -> Path:
    """A fleet file in the current folder."""
    path = Path(name)
    path.write_text(text)
    return path


def refused(*words: str | Path) -> str:
    """What is said by a command that a user's mistake ends: one error, status 1, no traceback."""
    said = splitee(*words)
    assert said.code == 1
    text = " ".join(said.err.split())  # however it was folded
    assert text.startswith("error: ")
    return text


# ---- boards ----


def test_boards_lists_every_board_file_as_json() -> None:
    said = splitee("boards", "--json")
    files = [tomllib.loads(p.read_text()) for p in (ROOT / "firmware" / "boards").glob("*.toml")]
    listed = {b["name"]: b for b in json.loads(said.out)}
    assert said.code == 0
    assert set(listed) == {f["name"] for f in files}
    whole = {f["name"]: f for f in files if "like" not in f}
    for file in files:
        of_another = whole[file["like"]] if "like" in file else {}
        for key, value in listed[file["name"]].items():
            assert value == {**of_another, **file}.get(key, 0), f"{file['name']}.{key}"


def test_boards_shows_every_board_with_its_memory() -> None:
    said = splitee("boards")
    for name in boards.load_boards():
        assert re.search(rf"\b{name}\b", said.out)
    (line,) = [line for line in said.out.splitlines() if "qemu-m4 " in line]
    for figure in ("mcu", "Cortex-M4F", "serial", "256 KB", "1,024 KB"):
        assert figure in line


# ---- plan ----

# bytes up a sample: float32 activations of the cut's shape, and a label
SHAPES = {"stem": (6, 8, 8), "layer1": (6, 8, 8), "layer2": (12, 4, 4), "layer3": (24, 2, 2)}


def test_the_demo_is_planned_for_four_clients_at_four_cuts() -> None:
    said = splitee("plan", DEMO, "--json")
    assert said.code == 0
    clients = json.loads(said.out)
    assert [(c["client"], c["board"], c["capacity"]) for c in clients] == [
        ("board", "qemu-m4", 8),
        ("process", "posix", 8),
        ("edge", "python", 16),
        ("local", "torch", 16),
    ]
    chosen = []
    for client in clients:
        assert [(row["number"], row["cut"]) for row in client["cuts"]] == [
            (1, "stem"),
            (2, "layer1"),
            (3, "layer2"),
            (4, "layer3"),
        ]
        chosen += [row["cut"] for row in client["cuts"] if row["chosen"]]
        limited = client["board"] in ("qemu-m4", "posix")
        for row in client["cuts"]:
            assert (row["ram_bytes"] is not None) == limited
            assert row["fits"] == (row["why"] is None)
            assert row["shard_bytes"] == 67 * row["samples"]
            assert (row["samples_that_fit"] is not None) == limited
            if limited and row["fits"]:
                assert row["samples_that_fit"] >= row["samples"]
            assert row["fits"] or not row["chosen"]
    assert chosen == ["stem", "layer1", "layer2", "layer3"]


def test_the_plan_counts_parameters_and_bytes_as_torch_does() -> None:
    clients = json.loads(splitee("plan", DEMO, "--json").out)
    model = zoo.build("resnet8", width=6, norm="group", channels=1)
    x = torch.zeros(1, 1, 8, 8)
    parameters = 0
    for row in clients[0]["cuts"]:
        stage = model.get_submodule(row["cut"])
        x = stage(x)
        assert tuple(x.shape[1:]) == SHAPES[row["cut"]]
        _, channels, height, width = x.shape
        head = channels * min(height, 4) * min(width, 4) * 10 + 10  # exits = "upto"
        parameters += sum(p.numel() for p in stage.parameters()) + head
        assert row["parameters"] == parameters
        assert row["bytes_up_per_sample"] == 4 * x.numel() + 1
        # arena: at least momentum, gradients, and the activations and their gradient at capacity
        assert row["arena_bytes"] >= 2 * 4 * parameters + 2 * 4 * 8 * x.numel()
        assert row["ram_bytes"] > row["arena_bytes"] + 4 * parameters
        assert row["flash_bytes"] > 4 * parameters


def test_the_plan_shows_a_table_for_each_client() -> None:
    said = splitee("plan", DEMO)
    assert said.code == 0
    for title in ("board on qemu-m4, 8 samples", "local on torch, 16 samples at once"):
        assert title in said.out
    taken = re.findall(r"^> \d (\w+) .* yes *$", said.out, re.MULTILINE)
    assert taken == ["stem", "layer1", "layer2", "layer3"]
    # the two that run firmware have levers
    assert said.out.count("its levers") == 2
    assert (
        len(
            re.findall(r"^ relu_bits +false +true +[\d,]+ +[-+][\d,]+ +none: exact", said.out, re.M)
        )
        == 2
    )


@pytest.mark.parametrize("exits", ["own", "upto"])
def test_the_plan_says_what_every_cut_costs_beside_a_single_one(
    exits: str, workplace: Path
) -> None:
    fleet = TINY.replace("rounds = 1", f'rounds = 1\nexits = "{exits}"')
    single = json.loads(splitee("plan", written(fleet), "--json").out)[0]
    every = json.loads(splitee("plan", written(fleet + "deepest = 'layer2'"), "--json").out)[0]
    assert (single["deepest"], every["deepest"]) == (None, "layer2")
    assert [row["cut"] for row in every["cuts"] if row["chosen"]] == ["stem"]
    heads = 0  # parameters of the exits that a single cut does not have
    for before, after in zip(single["cuts"], every["cuts"], strict=True):
        for memory in ("arena", "flash"):
            extra = after[f"{memory}_bytes"] - before[f"{memory}_bytes"]
            assert before[f"every_cut_{memory}_bytes"] == extra
            assert after[f"every_cut_{memory}_bytes"] == extra
        # gradients and momentum; weights and their initial values
        assert before["every_cut_arena_bytes"] >= 2 * 4 * heads
        assert before["every_cut_flash_bytes"] >= 4 * heads
        if exits == "upto":
            assert before["every_cut_arena_bytes"] == 0
        else:
            channels, height, width = SHAPES[before["cut"]]  # at width 6; here it is 2
            heads += channels // 3 * min(height, 4) * min(width, 4) * 10 + 10
    said = splitee("plan", written(fleet + "deepest = 'layer2'")).out
    assert "a on posix, 8 samples at once, built with every cut up to layer2" in said


def test_the_plan_says_by_how_much_a_segment_is_too_large(workplace: Path) -> None:
    said = splitee("plan", written(LARGE), "--json")
    rows = json.loads(said.out)[0]["cuts"]
    assert [row["cut"] for row in rows if row["fits"]] == ["stem", "layer1"]
    for row in rows[2:]:
        needed, more = row["ram_bytes"] / 1024, row["ram_bytes"] / 1024 - 256
        assert row["why"] == (
            f"needs {needed:,.0f} KB of RAM, {more:,.0f} KB more than the 256 KB there are"
        )


@pytest.mark.parametrize("command", ["plan", "build", "train"])
def test_a_segment_that_is_too_large_is_refused_with_the_cut_that_fits(
    command: str, workplace: Path
) -> None:
    text = refused(command, written(LARGE))
    assert 'client "a": its segment up to layer3 needs ' in text
    assert "more than the 256 KB there are on qemu-m4" in text
    assert text.endswith('cut at "layer1", which fits')


def test_auto_is_the_deepest_cut_that_fits(workplace: Path) -> None:
    path = written(LARGE.replace('"layer3"', '"auto"'))
    said = splitee("plan", path, "--json")
    rows = json.loads(said.out)[0]["cuts"]
    assert said.code == 0
    assert [row["cut"] for row in rows if row["chosen"]] == ["layer1"]


def test_where_no_cut_fits_the_plan_shows_why_and_is_refused(workplace: Path) -> None:
    path = written(LARGE.replace('"layer3"', '"auto"').replace("width = 8", "width = 24"))
    said = splitee("plan", path)
    assert said.code == 1
    assert re.findall(r"^\d (\w+) needs .* of RAM, ", said.out, re.MULTILINE) == list(SHAPES)
    assert 'client "a": its segment up to stem needs ' in said.err
    assert "take a narrower network" in said.err


# ---- build ----

# e_machine: x86-64, Arm, RISC-V (System V ABI)
MACHINES = {"posix": 0x3E, "qemu-m4": 0x28, "qemu-rv32": 0xF3}


@pytest.mark.parametrize("board", MACHINES)
def test_build_makes_an_elf_for(board: str, workplace: Path) -> None:
    if shutil.which(f"{boards.load_boards()[board].prefix}gcc") is None:
        pytest.skip(f"no compiler for {board}")
    said = splitee("build", written(TINY.replace("posix", board)))
    assert said.code == 0
    first, *_, last = said.out.splitlines()
    found = re.fullmatch(r"a: (\S+): ([\d,]+) bytes of flash, ([\d,]+) of RAM", first)
    assert found, said.out
    assert re.match(rf"a +{board} .* {found[3]} of ", last)
    elf = Path(found[1])
    content = elf.read_bytes()
    assert content[:4] == b"\x7fELF"
    if board != "posix" or os.uname().machine == "x86_64":
        assert int.from_bytes(content[18:20], "little") == MACHINES[board]
    assert elf.is_relative_to(Path("build") / "firmware")
    assert 10_000 < int(found[2].replace(",", "")) < len(content)
    before = elf.stat().st_mtime_ns
    assert splitee("build", "fleet.toml").out == said.out
    assert elf.stat().st_mtime_ns == before  # what is up to date is not made again


def test_build_takes_one_client_and_another_folder(workplace: Path) -> None:
    path = written(
        TINY + '[[client]]\nname = "b"\nboard = "posix"\ncut = 2\n[[client]]\nname = "c"\n'
    )
    said = splitee("build", path, "--client", "b", "--out", "elsewhere")
    assert said.code == 0
    assert said.out.startswith("b: elsewhere/")
    assert len(list(Path("elsewhere").glob("*/device.elf"))) == 1


def tools(folder: Path, *without: str) -> str:
    """A PATH that has everything but the programs whose names begin so."""
    folder.mkdir()
    for name in sorted({p.name for d in ("/usr/bin", "/bin") for p in Path(d).iterdir()}):
        if not name.startswith(without):
            (folder / name).symlink_to(shutil.which(name) or Path("/usr/bin") / name)
    return str(folder)


@pytest.mark.parametrize(
    ("tool", "packages"), [("make", "make"), ("gcc", "gcc libc6-dev")], ids=["make", "gcc"]
)
def test_a_missing_tool_is_named_with_its_debian_package(
    tool: str, packages: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", tool))
    text = refused("build", written(TINY))
    assert text.startswith(f"error: {tool} is not installed: ")
    assert text.endswith(f"`sudo apt-get install {packages}`")


@pytest.mark.parametrize(
    ("tool", "package"),
    [("qemu-system-arm", "qemu-system-arm"), ("arm-none-eabi-gcc", "gcc-arm-none-eabi")],
    ids=["emulator", "compiler"],
)
def test_without_it_the_board_trains_as_a_process_and_it_is_said(
    tool: str, package: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tool != "arm-none-eabi-gcc" and shutil.which("arm-none-eabi-gcc") is None:
        pytest.skip("no arm-none-eabi-gcc: the emulator is not looked for")
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", tool))
    said = splitee("train", written(TINY.replace("posix", "qemu-m4")))
    assert said.code == 0
    text = " ".join(said.out.split())
    assert f"a: {tool} is not installed: `make setup`, or `sudo apt-get install {package}" in text
    assert "; running the same firmware as a process instead" in text
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    (client,) = summary["clients"]
    assert (client["board"], client["link"][:6]) == ("posix", "udp://")
    assert client["flash_bytes"] > 0


def test_a_client_whose_cut_moves_keeps_its_firmware(workplace: Path) -> None:
    elves = []
    for cut, exits in (("stem", "own"), ("layer1", "upto"), ("layer1", "own")):
        text = TINY.replace('cut = "stem"', f'cut = "{cut}"\ndeepest = "layer1"')
        text = text.replace("rounds = 1", f'rounds = 1\nexits = "{exits}"')
        said = splitee("build", written(text))
        elf = Path(said.out.split(": ")[1])
        elves.append((elf, elf.stat().st_mtime_ns))
    assert len(set(elves)) == 1


# ---- mistakes ----

CLIENT = '[[client]]\nname = "a"\n'
BOARD = CLIENT + 'board = "posix"\n'

BAD_FLEETS = {
    "text that is no TOML": ('name = "x"\nrounds = = 3\n' + CLIENT, "bad.toml:2: not TOML: "),
    "a key that there is not": (
        'name = "x"\n' + CLIENT + 'bord = "posix"\n',
        "bad.toml:4: client[0].bord: there is no such key; there are name, count, ",
    ),
    "a value that cannot be": ('name = "x"\nrounds = 0\n' + CLIENT, "bad.toml:2: rounds: "),
    "a setting that there is not": (
        'name = "x"\nstrategy = "together"\n' + CLIENT,
        "bad.toml:2: strategy: Input should be 'averaging', 'sequential' or a class as "
        "'module:Class', not 'together'",
    ),
    "no client": ('name = "x"\n', "bad.toml:1: client: "),
    "two clients of one name": (
        'name = "x"\n' + 2 * CLIENT,
        "bad.toml:5: client[1].name: there is such a client already",
    ),
    "an unknown board": (
        'name = "x"\n' + CLIENT + 'board = "nucleo"\n',
        f'there is no board "nucleo": there are {", ".join(boards.load_boards())}',
    ),
    "an unknown cut": (
        'name = "x"\n' + BOARD + 'cut = "layer9"\n',
        'there is no cut "layer9": take one of 1 stem, 2 layer1, 3 layer2, 4 layer3',
    ),
    "a cut that a skip connection crosses": (
        'name = "x"\n' + BOARD + 'cut = "layer2.0.conv1"\n',
        'cut "layer2.0.conv1" is crossed: ',
    ),
    "a cut behind the deepest": (
        'name = "x"\n' + BOARD + 'cut = "layer2"\ndeepest = "layer1"\n',
        'client "a": cut "layer2" lies behind "layer1", the deepest that it is built with: ',
    ),
    "an unknown network": (
        'name = "x"\n[model]\nname = "lenet"\n' + CLIENT,
        'model "lenet" is unknown: take one of resnet8, resnet18, resnet20',
    ),
    "unknown data": (
        'name = "x"\n[data]\nname = "mnist"\n' + CLIENT,
        'data "mnist" is unknown: take one of digits',
    ),
    "a share of nothing": (
        'name = "x"\n' + CLIENT + 'share = 1e-6\n[[client]]\nname = "b"\n',
        'client "a": its share is less than one sample',
    ),
    "batch norm in parts": (
        'name = "x"\n[model]\nnorm = "batch"\n' + BOARD,
        'client "a": batch norm needs the whole batch at once: capacity = 16',
    ),
}


@pytest.mark.parametrize("title", BAD_FLEETS)
@pytest.mark.parametrize("command", ["plan", "build", "train", "client"])
def test_a_bad_fleet_is_refused(command: str, title: str, workplace: Path) -> None:
    text, words = BAD_FLEETS[title]
    options = ("--name", "a") if command == "client" else ()
    assert words in refused(command, written(text, "bad.toml"), *options)


@pytest.mark.parametrize("command", ["plan", "train", "client"])
def test_batch_norm_in_parts_is_refused(command: str, workplace: Path) -> None:
    options = ("--name", "a") if command == "client" else ()
    path = written('name = "x"\n[model]\nnorm = "batch"\n' + CLIENT + "capacity = 8\n")
    text = refused(command, path, *options)
    assert 'client "a": batch norm needs the whole batch at once: capacity = 16' in text


@pytest.mark.parametrize("command", ["plan", "build", "train"])
def test_a_fleet_file_that_is_not_there_is_refused(command: str, workplace: Path) -> None:
    text = refused(command, "nothing.toml")
    assert text == "error: nothing.toml: No such file or directory: is the path right?"


BAD_LINKS = {
    "no link": ("posix", "nonsense", "'nonsense' is no link; the forms there are: serial:/dev/"),
    "nobody there": ("python", "tcp://127.0.0.1:{port}", "is the device running, "),
    "no such port": ("posix", "/dev/ttyACM77", "there is no serial port /dev/ttyACM77: "),
    "torch, which has none": ("torch", "tcp://127.0.0.1:1", 'board "torch" takes no link'),
}


@pytest.mark.parametrize("title", BAD_LINKS)
def test_a_link_that_leads_nowhere_is_refused(title: str, workplace: Path) -> None:
    board, link, words = BAD_LINKS[title]
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        link = link.format(port=taken.getsockname()[1])
        path = written(TINY.replace("posix", board) + f'link = "{link}"\n')
        assert words in refused("train", path)


def test_build_refuses_a_client_that_there_is_not(workplace: Path) -> None:
    text = refused("build", written(TINY), "--client", "z")
    assert text == 'error: fleet.toml: no client "z": there are a'


def test_client_asks_which_of_a_fleets_clients_it_is(workplace: Path) -> None:
    text = refused("client", written(TINY))
    assert text == "error: fleet.toml: --name says which of its clients this is: there are a"


def test_client_refuses_a_name_that_there_is_not(workplace: Path) -> None:
    text = refused("client", written(TINY), "--name", "z")
    assert text == 'error: fleet.toml: no client "z": there are a'


@pytest.mark.parametrize(
    "address", ["nonsense", "7070", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://127.0.0.1:1"]
)
def test_client_refuses_what_is_no_address(address: str, workplace: Path) -> None:
    text = refused("client", written(TINY), "--name", "a", "--listen", address)
    assert text == f"error: cannot listen on '{address}': take the form tcp://host:port"


def test_client_refuses_a_port_that_is_taken(workplace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path = written(TINY)
        text = refused("client", path, "--name", "a", "--listen", f"tcp://127.0.0.1:{port}")
    assert f"cannot listen on 127.0.0.1:{port} (address already in use" in text


def test_eval_refuses_a_folder_that_is_no_run(workplace: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        text = refused("eval", folder)
        assert text.endswith(f"no checkpoint: is {folder} the folder of a run?")


def test_eval_refuses_a_checkpoint_that_is_none(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    assert "not a checkpoint of ours" in refused("eval", tmp_path)


def test_train_refuses_a_folder_that_cannot_be_written(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = written(TINY.replace("posix", "torch"))
    text = refused("train", path, "--runs", tmp_path / "file")
    assert "choose a folder that you may write to" in text


def test_train_refuses_a_strategy_that_cannot_be_loaded_before_it_builds(workplace: Path) -> None:
    path = written(TINY.replace("[model]", 'strategy = "nowhere:It"\n[model]', 1))
    text = refused("train", path)
    assert text.startswith('error: strategy "nowhere:It" cannot be loaded: ModuleNotFoundError')


NOBODY = """\
from splitee.strategies import Averaging

class Nobody(Averaging):
    def passes(self, clients, number):
        yield from ()
        return []
"""


def test_train_ends_with_an_error_where_too_few_clients_complete_a_round(
    workplace: Path, tmp_path: Path
) -> None:
    Path("nobody_completes.py").write_text(NOBODY)
    text = TINY.replace("posix", "torch")
    text = text.replace("[model]", 'strategy = "nobody_completes:Nobody"\n[model]', 1)
    said = splitee("train", written(text), "--runs", tmp_path)
    assert said.code == 1
    assert said.err.split(":")[:2] == ["error", " round 1"]
    assert "(min_clients = 1), twice: nobody is away: does the" in said.err
    does_not = "round 1 does not count: 0 of the 1 clients that it takes completed it"
    assert said.out.count(does_not) == 2


def test_ctrl_c_stops_without_a_traceback(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet, "read", interrupt)
    said = splitee("plan", written(TINY))
    assert (said.code, said.err.strip()) == (130, "")


# ---- as a program ----

IMPORTS = """
import sys
from splitee_host.cli import main
try:
    main()
finally:
    print("heavy:", *{"torch", "sklearn", "matplotlib"} & set(sys.modules), file=sys.stderr)
"""


def program(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("boards",)])
def test_help_and_boards_do_not_wait_for_torch(words: tuple[str, ...]) -> None:
    done = program("-c", IMPORTS, *words)
    assert (done.returncode, done.stderr) == (0, "heavy:\n")
    assert done.stdout


def test_a_mistake_ends_the_program_with_status_1_and_no_traceback() -> None:
    done = program("-m", "splitee_host.cli", "plan", "nothing.toml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("error: nothing.toml: No such file or directory: is the path right?\n")


def test_an_address_is_shown_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fleet.toml"
    path.write_text(
        'name = "usb"\n[model]\nwidth = 2\n[[client]]\nname = "board"\nboard = "qemu-m4"\n'
        'link = "usb:1234:5678"\ncut = "stem"\n'
    )
    said = splitee("train", path)  # ":1234:" is no picture
    assert said.code == 1
    assert "no board usb:1234:5678 is attached" in said.err
