from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from apot_fat import clipping_table, save_packed
from apot_fat.checkpoint import load_packed, read_checkpoint, write_checkpoint
from apot_fat.models import create_model
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.seam import get_kernels

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tiny_npz: tuple[Path, Path]) -> tuple[object, ...]:
    return "--data", tiny_npz[0], "--test-data", tiny_npz[1]


def test_published_chain_of_commands(run: Run, data: tuple[object, ...], tmp_path: Path) -> None:
    quick = (*data, "--epochs", 1, "-b", 16)
    for line in (
        "--arch res20 --bit 32 -id 0,1 --wd 5e-4",
        "--arch res20 --bit 4 -id 0,1 --wd 1e-4 --lr 4e-2 --init result/res20_32bit/model_best.pth.tar",
    ):
        code, out, err = run("train.py", *line.split(), *quick)
        assert (code, err) == (0, "")
    assert re.search(r"Epoch: \[0\]\[0/3\]\tTime \S+ \(\S+\)\tData .*\tLoss .*\tPrec \d+\.\d{3}% \(", out)
    assert re.search(r"^best acc: \d+\.\d{6}$", out, re.MULTILINE)
    code, out, err = run("train.py", *"-e --init result/res20_4bit/model_best.pth.tar -e -id 0 --bit 4".split(), *data)
    assert (code, err) == (0, "")
    assert re.search(r"^Test: \[0/1\]\tTime \S+ \(\S+\)\tLoss \S+ \(\S+\)\tPrec \S+% \(\S+%\)$", out, re.MULTILINE)
    assert re.search(r"^ \* Prec \d+\.\d{3}%$", out, re.MULTILINE)
    assert len(re.findall(r"^clipping threshold weight alpha: \d\.\d{6}, activation", out, re.MULTILINE)) == 20
    assert out.index("* Prec") < out.index("clipping threshold")
    shown = run("show_params.py", "result/res20_4bit/model_best.pth.tar")[1]
    assert shown in out


def test_thresholds_as_table_csv_and_json(run: Run, tmp_path: Path) -> None:
    model = create_model("resnet20", bits=3)
    with torch.no_grad():
        for i, (_, layer) in enumerate(threshold_layers(model)):
            assert layer.act_alpha is not None
            layer.act_alpha.fill_(1.0 + i)
    write_checkpoint({"state_dict": model.state_dict()}, tmp_path / "net.pth")
    save_packed(model, tmp_path / "net.safetensors")
    rows = [(layer.name, layer.weight_alpha, layer.act_alpha) for layer in clipping_table(model)]
    for path in (tmp_path / "net.pth", tmp_path / "net.safetensors"):
        found = json.loads(run("show_params.py", path, "--json")[1])
        assert [tuple(row.values()) for row in found] == rows
        lines = run("show_params.py", path, "--csv")[1].splitlines()
        assert lines[0] == "layer,weight_alpha,act_alpha"
        assert lines[1:] == [",".join(map(str, row)) for row in rows]
        table = run("show_params.py", path, "--table")[1].splitlines()
        assert len(table) == 2 + len(rows)
        assert table[-1].split() == ["layer3.2.conv2", "3.000", "█" * 12, "20.000", "█" * 12]
        assert table[2].endswith("1.000  ▋")
        assert table == str(clipping_table(model)).splitlines()
    # met as it is written, or as the buffer is emptied at the end
    for options, unbuffered in ((f"{tmp_path}/net.pth", "1"), (f"{tmp_path}/net.pth", ""), ("--help", "")):
        piped = f"{sys.executable} {ROOT}/scripts/show_params.py {options} | true; exit ${{PIPESTATUS[0]}}"
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stderr) == (0, "")


def test_published_fat_commands(run: Run, data: tuple[object, ...]) -> None:
    quick = (*data, "--epochs", 1)
    assert run("train.py", *"--arch resnet_20 --bit 5 --gpu 0".split(), *quick)[0] == 0
    code, out, _ = run("train.py", *"--arch resnet_20 --use_pretrain --batch_size 24 --bit 4 --gpu 0".split(), *quick)
    assert code == 0
    config = Path("result/resnet_20_4bit/config.toml").read_text()
    assert 'init = "result/resnet_20_5bit/model_best.pth.tar"' in config
    assert 'preset = "fat-cifar"' in config
    assert "batch_size = 24" in config
    code, out, _ = run("train.py", *"--arch resnet_20 --test_only --bit 4 --gpu 0".split(), *data)
    assert code == 0
    assert "* Prec" in out


def test_our_checkpoints_know_their_network_and_data(run: Run, data: tuple[object, ...]) -> None:
    assert run("train.py", "--arch", "res20", "--bit", 3, "--epochs", 1, *data)[0] == 0
    code, out, err = run("evaluate.py", "--init", "result/res20_3bit/model_best.pth.tar")
    assert (code, err) == (0, "")
    assert "of 21 images correct" in out
    code, again, _ = run("evaluate.py", "--init", "result/res20_3bit/model_best.pth.tar", "--compile", "off")
    assert code == 0
    assert get_kernels() == "eager"
    assert "of 21 images correct" in again
    code, _, err = run("evaluate.py", "--init", "result/res20_3bit/model_best.pth.tar", "-a", "resnet56")
    assert code == 2
    assert "holds res20, not resnet56" in err
    onnxruntime = pytest.importorskip("onnxruntime")
    code, _, err = run("export.py", "result/res20_3bit/model_best.pth.tar", "--to", "onnx", "--output", "net.onnx")
    assert (code, err) == (0, "")
    inputs = onnxruntime.InferenceSession("net.onnx").get_inputs()
    assert inputs[0].shape[1:] == [3, 8, 8]  # those of its own images, not its papers' 32 × 32


def test_progressive_prints_table_and_figure(run: Run, data: tuple[object, ...], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('arch = "vgg_tiny"\nepochs = 1\nchain = [32, 4, 3]\n')
    code, out, err = run("progressive.py", "--config", recipe, "--bits", "4,3", "--output", "out", *data)
    assert (code, err) == (0, "")
    assert re.search(r"^network +method +bits", out, re.MULTILINE)
    assert Path(out.rsplit("figure: ", 1)[1].strip()).is_file()
    assert 'init = "out/vgg_tiny_4bit/model_best.pth.tar"' in Path("out/vgg_tiny_3bit/config.toml").read_text()
    beside = Path("out/vgg_tiny_2bit/checkpoint.pth.tar")  # of a run that has finished no epoch
    beside.parent.mkdir()
    content = read_checkpoint("out/vgg_tiny_3bit/checkpoint.pth.tar")
    write_checkpoint({**content, "history": []}, beside)
    code, out, err = run("progressive.py", "--config", recipe, "--bits", "4,3", "--output", "out", *data)
    assert (code, err) == (0, "")
    assert out.count("finished before, skipped") == 2
    assert "not in the table: out/vgg_tiny_2bit: the run has finished no epoch yet" in out
    Path("out/vgg_tiny_4bit/model_best.pth.tar").unlink()  # what is drawn is then of the last epoch
    code, _, err = run("progressive.py", "--config", recipe, "--bits", "4,3", "--output", "out", *data)
    assert (code, err) == (0, "")
    code, out, err = run("report.py", "out", "--output", "r.html")
    assert (code, err) == (0, "")
    assert "not in the report: out/vgg_tiny_2bit: the run has finished no epoch yet" in out


def test_a_run_folder_stands_for_its_best_checkpoint(run: Run, data: tuple[object, ...]) -> None:
    assert run("train.py", "--arch", "vgg_tiny", "--bit", 3, "--epochs", 1, *data)[0] == 0
    folder, best = Path("result/vgg_tiny_3bit"), Path("result/vgg_tiny_3bit/model_best.pth.tar")
    said = f"{folder}: its model_best.pth.tar\n"
    for script, options in (
        ("show_params.py", ()),
        ("show_params.py", ("--table",)),
        ("evaluate.py", ("--init",)),
        ("export.py", ("--to", "packed", "--output", "net.safetensors")),
    ):
        code, out, err = run(script, *options, folder)
        assert (code, err) == (0, "")
        of_file = run(script, *options, best)[1]
        timed = r"Time [\d.]+ \([\d.]+\)"
        assert re.sub(timed, "", out) == said + re.sub(timed, "", of_file)
    assert run("show_params.py", folder, "--json") == run("show_params.py", best, "--json")
    for script, option in (("show_params.py", ()), ("evaluate.py", ("--init",))):
        code, _, err = run(script, *option, "result")
        assert (code, err.count("\n")) == (2, 1)
        assert "result: is no run folder, it holds no model_best.pth.tar" in err


def test_a_packed_file_goes_on_taking_the_images_of_its_run(run: Run, data: tuple[object, ...]) -> None:
    # FAT's networks of the papers were normalised otherwise than this run, and the images lie elsewhere now
    line = ("--arch", "vgg_tiny", "--preset", "fat-cifar", "--bit", 3, "--epochs", 1)
    assert run("train.py", *line, "--mean", "0.1,0.2,0.3", "--std", "2,2,2", *data)[0] == 0
    assert run("export.py", "result/vgg_tiny_3bit", "--to", "packed", "--output", "net.safetensors")[0] == 0
    found = []
    for source in ("result/vgg_tiny_3bit", "net.safetensors"):
        code, out, _ = run("evaluate.py", "--init", source, *data)
        assert code == 0
        found.append(re.findall(r"Loss [\d.]+ \([\d.]+\)|^\d+ of .*", out, re.MULTILINE))
    assert found[0] == found[1]
    assert found[0]


def test_digits_are_the_default_and_a_named_architecture_means_its_papers_data(run: Run) -> None:
    code, out, _ = run("train.py", "--epochs", 1, "--batch-size", 512, "--bit", 4)
    assert code == 0
    assert "on digits" in out
    code, _, err = run("train.py", "--arch", "res20", "--bit", 4, "--init", "absent.pth")
    assert code == 2
    assert "cifar10" in err  # not to be had in an empty folder without a network, and said before anything else


def test_bad_input_is_one_line_with_exit_code_2_and_creates_nothing(
    run: Run, tmp_path: Path, data: tuple[object, ...]
) -> None:
    text = tmp_path / "text.pth"
    text.write_text("hello\n")
    full = tmp_path / "full.pth"
    write_checkpoint({"state_dict": create_model("res20", bits=32).state_dict()}, full)
    quantized = tmp_path / "quantized.pth"
    write_checkpoint({"state_dict": create_model("res20", bits=3).state_dict()}, quantized)
    many = tmp_path / "many.npz"
    np.savez(many, images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.array([0, 99]))
    unknown = tmp_path / "unknown.toml"
    unknown.write_text("learning = 1\n")
    twice = tmp_path / "twice.toml"
    twice.write_text("chain = [4, 4]\n")
    to_int8 = ("--arch", "res20", "--to", "onnx", "--mode", "int8", "--output", "net.onnx")
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("train.py", ("--arch", "res21"), "unknown architecture 'res21' (did you mean 'resnet20'?)"),
        ("train.py", ("--bit", 0), "bit 0: choose an integer from 2 to 8, or 32"),
        ("train.py", ("--arch", "vgg16", "--data", "digits"), "arch vgg16: refuses images of 3 × 8 × 8 ("),
        ("train.py", ("--device", "cuda:99999999999"), "device 'cuda:99999999999': choose auto, cpu, cuda or cuda:N"),
        ("progressive.py", ("--bit", 3), "--bit 3: a chain has several; name them with --bits"),
        ("train.py", ("--bit", 1.5), "bit 1.5: choose an integer from 2 to 8, or 32"),
        ("train.py", ("--bit", 33), "bit 33: choose an integer from 2 to 8, or 32"),
        ("train.py", ("--bit", "four"), "bit 'four': choose an integer from 2 to 8, or 32"),
        ("train.py", ("--lr", -0.1), "lr -0.1: expected a number above 0"),
        ("train.py", ("--data", "absent"), "no data set 'absent'"),
        ("train.py", ("--init", "absent.pth", *data), "checkpoint absent.pth: no such file"),
        ("train.py", ("--init", text, *data), "not a PyTorch checkpoint"),
        ("train.py", ("--arch", "res56", "--init", full, *data), "does not fit this CifarResNet: missing layer1.3"),
        ("train.py", ("--config", unknown), "unknown key 'learning'"),
        ("train.py", ("--config", "absent.toml"), "no such file"),
        ("train.py", ("--frob", 3), "unrecognized arguments: --frob 3"),
        ("train.py", ("--device", "tpu", *data), "device 'tpu': choose auto, cpu, cuda or cuda:N"),
        ("train.py", ("--use_pretrain", *data), "name one with --init"),
        ("evaluate.py", (), "name one with --init"),
        ("evaluate.py", ("--test_only", "--arch", "res20", "--bit", 4), "is not there"),
        ("evaluate.py", ("--init", text, "--bit", 4), "not a PyTorch checkpoint"),
        ("evaluate.py", ("--init", quantized), "records no network and lies in no <arch>_<bits>bit folder; give --bit"),
        (
            "evaluate.py",
            ("--init", full, "--bit", 4, *data),
            "of full precision, not of 4 bits",
        ),
        ("evaluate.py", ("--init", full, "--bit", 32, "--data", many), "has 10 outputs"),
        ("progressive.py", ("--bits", "4,x"), "bits '4,x': expected bit-widths"),
        ("progressive.py", ("--bits", "4,3,4"), "bits '4,3,4': 4 twice; each has one run in the output folder"),
        ("progressive.py", ("--config", twice), "chain [4, 4]: 4 twice"),
        (
            "export.py",
            (full, *to_int8, "--data", many),
            "holds a full-precision network; give a quantized one",
        ),
        (
            "export.py",
            (quantized, *to_int8, "--bit", 3),
            "are measured on images: name some with --data",
        ),
        *(
            ("export.py", (quantized, "--arch", "res20", "--bit", 3, "--to", kind, "--output", name, *argv), message)
            for kind, name, argv, message in (
                ("packed", "q.safetensors", ("--mode", "int8"), "--mode with --to packed: is for onnx; leave it out"),
                (
                    "packed",
                    "q.safetensors",
                    ("--grid-bits", 9),
                    "--grid-bits with --to packed: is for qonnx, c, verilog",
                ),
                ("packed", "q.safetensors", ("--multiply",), "--multiply with --to packed: is for c; leave it out"),
                ("packed", "q.safetensors", ("--channels-last",), "--channels-last with --to packed: is for qonnx;"),
                ("packed", "q.safetensors", ("--data", many), "--data with --to packed: is for onnx, qonnx, c"),
                ("onnx", "q.onnx", ("--accumulator-bits", 9), "--accumulator-bits with --to onnx: is for qonnx, c"),
                ("onnx", "q.onnx", ("--mean", "0,0,0"), "--mean: is for the images of --data; name some, or leave it"),
            )
        ),
        ("train.py", ("--resume", full), "not written by a training run of apot-fat"),
        ("progressive.py", ("--bits", "4,9"), "bits 9: choose an integer"),
        (
            "quantize.py",
            ("--init", full, "--output", "q.safetensors"),
            "records no network and lies in no <arch>_<bits>bit folder; give --arch",
        ),
        ("quantize.py", ("--init", full, "--arch", "res20", "--output", "q.pt"), "a packed file ends in .safetensors"),
        ("quantize.py", ("--init", text, "--output", "q.safetensors"), "not a PyTorch checkpoint"),
        ("quantize.py", ("--init", "torchvision", "--output", "q.safetensors"), "name the network with --arch"),
        *(
            ("quantize.py", ("--init", full, "--arch", "res20", "--output", "q.safetensors", *data, *argv), message)
            for argv, message in (
                (("--bits", 9), "argument --bits: invalid choice: 9"),
                (("--bits", 32), "argument --bits: invalid choice: 32"),
                (("--edge-bits", 4), "argument --edge-bits: invalid choice: 4"),
                (("--bits", 4, "--average", 3), "argument --average: not allowed with argument --bits"),
                (("--images", 0), "--images 0: give at least 1"),
                (("--average", 1), "--average 1: choose a number from 2 to 8"),
                (("--reconstruct", "--steps", -1), "steps -1: choose a number from 0"),
                (("--steps", 7), "--steps 7: counts steps of --reconstruct, which is not given"),
                (("--joint-steps", 0), "--joint-steps 0: counts steps of --reconstruct, which is not given"),
                (("--method", "pot", "--bits", 7), "--method pot --bits 7: no packed file holds it (levels over 4611"),
                (("--method", "pot", "--average", 6), "--average 6: choose a number from 2 to 5"),
                (("--method", "fft"), "invalid choice: 'fft'"),
            )
        ),
        ("show_params.py", (text,), "not a PyTorch checkpoint"),
        ("show_params.py", (full,), "holds no clipping thresholds"),
        ("report.py", ("absent", "--output", "r.html"), "absent: no such file or folder"),
        ("report.py", (tmp_path / "work", "--output", "r.html"), "neither a run folder"),
        ("report.py", (text, "--output", "r.html"), "not a PyTorch checkpoint"),
        ("report.py", (many, "--output", "r.html"), "not a PyTorch checkpoint"),
        ("report.py", (full, "--output", "r.html"), "give --arch"),
        ("report.py", (full, "--arch", "res20", "--data", "absent", "--output", "r.html"), "no data set 'absent'"),
        ("report.py", (full,), "--output"),
    ]
    for script, argv, message in cases:
        code, out, err = run(script, *argv)
        assert code == 2, (script, argv)
        assert message in err
        assert err.startswith(f"{script}: error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err + out
        assert not list(Path.cwd().iterdir()), (script, argv)


def test_a_run_whose_gradient_is_not_finite_exits_with_3_and_one_line(run: Run, data: tuple[object, ...]) -> None:
    code, _, err = run("train.py", *data, "--bit", 4, "--epochs", 5, "--lr", 1e30, "--batch-size", 16)
    assert code == 3, err
    assert err.count("\n") == 1
    assert "gradient not finite" in err


def test_benchmark_prints_a_table_and_writes_json(run: Run) -> None:
    code, out, err = run("benchmark.py", *"memory --batch-size 32 --compile off --threads 1 --json rows.json".split())
    assert (code, err) == (0, "")
    assert re.search(r"^what +MiB +/ fp32$", out, re.MULTILINE)
    rows = json.loads(Path("rows.json").read_text())
    assert [row["what"] for row in rows] == ["fp32", "apot-cifar", "fat-cifar"]
    assert max(row["/ fp32"] for row in rows) < 1.35
    code, _, err = run("benchmark.py", "step", "--seconds", 0)
    assert code == 2
    assert err.count("\n") == 1


def test_a_checkpoint_alone_says_how_its_run_goes_on(run: Run, data: tuple[object, ...]) -> None:
    options = ("--arch", "res20", "--bit", 3, "--lr", 0.02, "--batch-size", 16, "--output", "one")
    assert run("train.py", *data, *options, "--epochs", 1)[0] == 0
    Path("one").rename("two")
    code, out, err = run("train.py", "--resume", "two/res20_3bit/checkpoint.pth.tar", "--epochs", 2)
    assert (code, err) == (0, "")
    assert "lr_steps 150, 225: not reached in 2 epochs" in out
    assert len(Path("two/res20_3bit/metrics.jsonl").read_text().splitlines()) == 2
    assert not Path("one").exists()
    code, _, err = run("train.py", "--resume", "two/res20_3bit/checkpoint.pth.tar", "--lr", 0.1)
    assert code == 2
    assert "was run with lr = 0.02, not 0.1" in err


def test_report_of_a_run_and_a_checkpoint(run: Run, data: tuple[object, ...], tmp_path: Path) -> None:
    assert run("train.py", "--arch", "resnet_20", "--bit", 3, "--epochs", 1, *data)[0] == 0
    weights = tmp_path / "res20_32bit" / "model_best.pth.tar"
    write_checkpoint({"state_dict": create_model("res20", bits=32).state_dict(), "best_prec": 12.5}, weights)
    paths = "result/resnet_20_3bit", weights
    code, out, err = run("report.py", *paths, "--output", "pages/report.html", "--image-size", 8)
    assert (code, err) == (0, "")
    said = out.splitlines()
    assert said[0].endswith("model_best.pth.tar records no network: taken for res20, apot-cifar, at 32 bits")
    assert said[1].startswith("pages/report.html: 2 networks, ")
    html = Path("pages/report.html").read_text()
    assert "12.50 %" in html
    assert "fp32: No curves" in html
    assert [path.name for path in Path("pages").iterdir()] == ["report.html"]


def test_the_bits_of_a_config_are_those_that_are_trained(run: Run, data: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "three.toml"
    path.write_text('arch = "resnet20"\nbit = 3\nepochs = 1\nbatch_size = 16\ncrop_padding = 1\n')
    code, out, _ = run("train.py", "--config", path, *data)
    assert code == 0
    assert out.splitlines()[-1].endswith("resnet20_3bit")
    # what a run leaves says what it was
    code, _, err = run("train.py", "--config", "result/resnet20_3bit/config.toml")
    assert code == 2
    assert "resnet20_3bit holds a run already" in err


def test_an_environment_that_is_not_torchruns_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "abc")
    code, _, err = run("benchmark.py")
    assert code == 2
    assert err == "benchmark.py: error: environment variable RANK='abc': expected an integer; leave it to torchrun\n"


@pytest.mark.parametrize(
    "script",
    ["benchmark.py", "train.py", "evaluate.py", "progressive.py", "show_params.py", "report.py", "quantize.py"],
)
def test_help(run: Run, script: str) -> None:
    code, out, _ = run(script, "--help")
    assert code == 0
    assert "usage:" in out


def test_released_checkpoint_from_the_command_line(run: Run, reference: Path) -> None:
    checkpoint = reference / "reference/released/res20_3bit/model_best.pth.tar"
    images = reference / "data/cifar10_lossless_test.npz"
    torch.set_num_threads(1)
    code, out, err = run("evaluate.py", "-e", "--init", checkpoint, "-e", "-id", 0, "--bit", 3, "--data", images)
    assert (code, err) == (0, "")
    assert "Prec 96.000% (96.000%)" in out
    correct = re.search(r"(\d+) of 1017 images correct", out)
    assert correct is not None
    assert abs(int(correct[1]) - 946) <= 1
    assert "clipping threshold weight alpha: 1.569000, activation alpha: 1.438000\n" in out


def test_one_weight_threshold_a_channel_is_recorded_and_restored(run: Run, data: tuple[object, ...]) -> None:
    line = ("train.py", *"--arch res20 --bit 3 --preset lsq --epochs 1 -b 16".split(), *data)
    assert run(*line, "--weight-per-channel")[0] == 0
    folder = Path("result/res20_3bit")
    best = folder / "model_best.pth.tar"
    assert "weight_per_channel = true" in (folder / "config.toml").read_text()
    code, _, err = run(*line, "--resume", "auto")
    assert code == 2
    assert "was run with weight_per_channel = True, not False" in err
    code, out, _ = run("evaluate.py", "--init", best)
    assert code == 0
    assert run("show_params.py", best)[1] in out
    row = json.loads((folder / "metrics.jsonl").read_text())
    shown = float(re.findall(r"weight alpha: (\d\.\d+)", out)[0])
    assert row["layers"]["layer1.0.conv1"]["weight_alpha"] == pytest.approx(shown, abs=1e-3)
    assert run("export.py", best, "--to", "packed", "--output", "small")[0] == 0
    state = torch.load(best, weights_only=True)["state_dict"]
    alpha = dict(load_packed("small").named_parameters())["layer1.0.conv1.weight_alpha"]
    assert torch.equal(alpha, state["layer1.0.conv1.weight_alpha"])
    assert alpha.shape == (16,)
