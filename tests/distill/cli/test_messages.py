"""What people write by mistake, and the words that the answer must have: one row each."""

import json
from pathlib import Path

import pytest
from PIL import Image

from distill.errors import RecipeError
from distill.job.prepare import JobRequest, prepare
from distill.listing.document import builtin_recipes
from tests.support.command import Run

FAMILY = """\
name: test
teacher: {train: quickstart_teacher.yaml}
students:
  - {name: small, arch: vit, width: 64, depth: 3, heads: 2, patch: 8}
data: {sources: [pictures]}
crops: {global: 48, local: {count: 2, size: 24}}
schedule:
  batch: 32
  steps: 10
  lr: {peak: 2e-4}
engine: {device: cpu, processes: 1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user stands in: a recipe that is right, and a picture."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (70, 80)).save(tmp_path / "pictures" / name / "one.png")
    teacher = builtin_recipes()["quickstart_teacher"].read_text()
    (tmp_path / "quickstart_teacher.yaml").write_text(teacher)
    (tmp_path / "r.yaml").write_text(FAMILY)
    return tmp_path


# Overrides of a recipe that is right: the message, which is the only problem
OVERRIDES = [
    ("schedule.lr=1e-3", "schedule.lr is a group: write schedule.lr.peak=1e-3; its keys: peak, end"),
    ("data=pictures", "data is a group: write data.sources=[pictures]; its keys: sources, "),
    ("crops=3", "crops is a group: write one of its keys below it, global, local, flip"),
    ("schedule=", "no value: write schedule=VALUE, or schedule=null for none"),
    ("schedule=null", "schedule is a group: write one of its keys below it, batch, lr"),
    ("objective=[1]", "objective is a group: write one of its keys below it, dino, ibot"),
    ("students=vits16", "students is a list: write students=[vits16]"),
    ("students={arch: vits16}", "students is a list: write students=[{arch: vits16}]"),
    ("data.sources=pictures", "data.sources is a list: write data.sources=[pictures]"),
    ("data.mean=0.5", "data.mean is a list: write data.mean=[0.5, 0.5, 0.5]"),
    ("crops.blur_sigma=0.5", "crops.blur_sigma is a list: write crops.blur_sigma=[0.5, 0.5]"),
    ("schedule.batch=[16]", "schedule.batch takes one value, not a list: write schedule.batch=16"),
    ("schedule.batch={size: 16}", "schedule.batch takes one value, not a group: write schedule.batch=16"),
    ("schedule.lr.peak=[1, 2]", "schedule.lr.peak takes one value, not a list"),
    ("schedule.batch='16'", "(got '16') - did you mean 16, without quotes?"),
    ("schedule.lr.peak='1e-3'", "(got '1e-3') - did you mean 1e-3, without quotes?"),
    ("schedule.lr.peak=0,001", "(got '0,001') - did you mean 0.001?"),
    ("schedule.batch=1 024", "(got '1 024') - did you mean 1024?"),
    ("schedule.steps=10k", "(got '10k') - did you mean 10000?"),
    ("crops.flip=50%", "(got '50%') - did you mean 0.5?"),
    ("schedule.steps=1e6", "(got 1000000.0) - did you mean 1000000?"),
    ("schedule.batch=many", "schedule.batch': Input should be a valid integer (got 'many')"),
    ("schedule.batch=null", "Input should be a valid integer (got null)"),
    ("schedule.batch=true", "Input should be a valid integer (got true)"),
    ("engine.activation_checkpointing=yes", "(got 'yes') - did you mean true?"),
    ("engine.activation_checkpointing=off", "(got 'off') - did you mean false?"),
    ("engine.activation_checkpointing=1", "(got 1) - did you mean true?"),
    ("name=5", "(got 5) - did you mean '5', in quotes?"),
    ("schedule.batch=0", "Input should be greater than or equal to 1 (got 0)"),
    ("schedule.lr.peak=-1e-3", "Input should be greater than 0 (got -0.001)"),
    ("crops.flip=1.5", "Input should be less than or equal to 1 (got 1.5)"),
    ("engine.device=gpu", "Input should be 'auto', 'cpu' or 'cuda' (got 'gpu')"),
    ("lr=3", "unknown key 'lr' - did you mean 'schedule.lr'?"),
    ("batch=3", "unknown key 'batch' - did you mean 'schedule.batch'?"),
    ("heads=fit", "unknown key 'heads' - did you mean 'teacher.heads'?"),
    ("schedule.weights=x", "unknown key 'schedule.weights' - did you mean 'teacher.weights'?"),
    ("width=64", "unknown key 'width' - did you mean 'students.0.width'?"),
    ("schedule.bach=3", "unknown key 'schedule.bach' - did you mean 'batch'?"),
    ("foo=1", "unknown key 'foo' - known here: name, format, seed"),
    ("students=[vits61]", "students.0.arch': 'vits61' is not known - did you mean 'vits16'?"),
    ("students.0=vitss16", "students.0.arch': 'vitss16' is not known - did you mean 'vits16'?"),
    ("students=[]", "students is empty: give one at least"),
    ("data.sources=[{pth: pictures}]", "unknown key 'data.sources.0.pth' - did you mean 'path'?"),
    ("teacher={wieghts: x}", "unknown key 'teacher.wieghts' - did you mean 'weights'?"),
    ("students=[{arch: vit, widht: 64, depth: 3, heads: 2, patch: 8}]", "did you mean 'width'?"),
    ("data.sources=[/nowhere]", "data.sources.0.path': '/nowhere' is not there"),
    ("teacher.heads=fti", "teacher.heads': 'fti' - did you mean 'fit'?"),
    ("teacher.heads=None", "teacher.heads': 'None' - did you mean 'none'?"),
    ("students.small.lr=1e-4", "there is no 'students.small.lr' in this recipe - did you mean 'students.0.lr'?"),
    ("students.3.lr=1e-4", "there is no 'students.3.lr' in this recipe - it has items 0 to 0"),
    ("schedule.drop_path=0.1", "- a key of the teacher's recipe: teacher:schedule.drop_path"),
    ("stages=[]", "override 'stages': stages is empty: give one at least"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[each[0] for each in OVERRIDES])
def test_override__one_problem_and_what_to_write(
    override: str, expected: str, here: Path, distill: Run
) -> None:
    code, out, err = distill("check", "r.yaml", override)
    assert (code, out) == (2, "")
    assert expected in err
    assert sum(line.startswith(("override", "r.yaml:")) for line in err.splitlines()) == 1, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Fix: ")


# Places in a file: what is replaced, by what, and the message with the place before it
IN_FILE = [
    ("{peak: 2e-4}", "1e-3", "r.yaml:10:7: schedule.lr is a group: write lr: {peak: 1e-3}"),
    ("[pictures]", "pictures", "r.yaml:5:17: data.sources is a list: write sources: [pictures]"),
    ("[pictures]", "[/nowhere]", "r.yaml:5:18: data.sources.0.path: '/nowhere' is not there"),
    ("[pictures]", "[pictures, /no]", "r.yaml:5:28: data.sources.1.path: '/no' is not there"),
    ("[pictures]", '[{path: "/no"}]', "r.yaml:5:25: data.sources.0.path: '/no' is not there"),
    ("yaml}", "yaml, heads: fti}", "r.yaml:2:50: teacher.heads: 'fti' - did you mean 'fit'?"),
    ("  batch: 32", "  batch: '32'", "r.yaml:8:10: schedule.batch: Input should be a valid integer"),
    ("{count: 2,", "{count:2,", "unknown key 'crops.local.count:2' - a space is missing after"),
    ("  steps: 10", "  steps: 10\n  warmup: 3", "unknown key 'schedule.warmup' - did you mean"),
    ("[pictures]", '["D:\\new"]', "r.yaml:5:18: data.sources.0.path: 'D:\\new' is not there or no source"),
    ("[pictures]", '["D:\\new"]', "in double quotes a backslash has a meaning"),
    ("teacher.yaml}", "teachr.yaml}", "relative to this recipe - did you mean 'quickstart_teacher.yaml'?"),
    ("quickstart_teacher.yaml", "no.yaml", "r.yaml:2:18: teacher.train: no.yaml does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), IN_FILE, ids=[each[1] for each in IN_FILE])
def test_recipe__one_problem_at_its_place(
    old: str, new: str, expected: str, here: Path, distill: Run
) -> None:
    assert FAMILY.count(old) == 1
    (here / "r.yaml").write_text(FAMILY.replace(old, new))
    code, _, err = distill("check", "r.yaml")
    assert code == 2 and expected in err
    assert "1 problem in r.yaml." in err, err


def test_recipe__problems_have_the_path_as_it_was_given(here: Path, distill: Run) -> None:
    (here / "deep").mkdir()
    (here / "deep" / "r.yaml").write_text(FAMILY.replace("batch: 32", "batch: many"))
    (here / "deep" / "y.yaml").write_text("name: [x\n")
    for path in ("deep/r.yaml", str(here / "deep" / "r.yaml")):
        assert f"{path}:2:18: teacher.train" in distill("check", path).err
    assert distill("check", "deep/y.yaml").err.startswith("deep/y.yaml:1:7: a bracket is never")


def test_prepare__names_the_place_of_a_source_that_is_not_there(here: Path) -> None:
    (here / "r.yaml").write_text(FAMILY.replace("pictures", "/nowhere"))
    request = JobRequest("r.yaml", (), str(here / "run"), "")
    with pytest.raises(RecipeError, match=r"r\.yaml:5:18: data\.sources\.0\.path: '/nowhere' is"):
        prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    assert not (here / "run").exists()


# Texts that are no YAML: place, cause
YAML = [
    ("name: x\nschedule:\n\tbatch: 1\n", "3:1", "a tab: write spaces"),
    ("name: x\nschedule:\n  batch:\t1\n", "3:9", "a tab: write spaces"),
    ("name: x\r\n\tseed: 1\r\n", "2:1", "a tab: write spaces"),
    ("name: x\nseed:1\ndata: {}\n", "2:5", "a space is missing after the colon"),
    ("schedule:\n  batch:3\n  steps: 4\n", "2:8", "a space is missing after the colon"),
    ("schedule:\n  steps: 4\n  batch:3\nseed: 1\n", "3:8", "a space is missing after the colon"),
    ("students:\n  - vits16\n  -vitb16\n", "3:3", "a space is missing after the dash"),
    ("students:\n  -{arch: vit, width: 4}\n", "2:3", "a space is missing after the dash"),
    ('name: "x\nseed: 1\n', "1:7", 'a quote is never closed: "'),
    ("name: 'x\nseed: 1\n", "1:7", "a quote is never closed: '"),
    ('name: "x\nstages: "y"\n', "2:10", 'a quote is never closed, here or above: "'),
    ("students: [a, b\nseed: 1\n", "1:11", "a bracket is never closed: ["),
    ("schedule: {batch: 3\nseed: 1\n", "1:11", "a bracket is never closed: {"),
    ("students: [a, b", "1:11", "a bracket is never closed: ["),
    ("data: {sources: [a, b}\n", "1:22", "[ is closed by }: write ]"),
    ("students: [a, b]]\n", "1:17", "a bracket is closed that was never opened"),
    ("schedule: {batch: 3 steps: 4}\n", "1:26", "a comma is missing before this"),
    ('{"name": "x",\n "seed": 1\n "a": 2}\n', "3:5", "a comma is missing before this"),
    ("schedule: {}\nseed: 1\nschedule: {}\n", "3:1", "'schedule' is there twice, first in line 1"),
    ("schedule: {batch: 1, batch: 2}\n", "1:22", "'batch' is there twice, first in line 1"),
    ("schedule:\n  batch: 3\n   steps: 4\n", "3:4", "this line begins 3 spaces in, the one above 2"),
    ("schedule:\n   batch: 3\n  steps: 4\n", "3:3", "this line begins 2 spaces in, the one above 3"),
    ('data: {sources: ["C:\\Users\\me"]}\n', "1:18", "in double quotes has a meaning: write 'C:\\Users\\me'"),
    ('data: {sources: ["D:\\data"]}\n', "1:18", "in double quotes has a meaning: write 'D:\\data'"),
    ("name: my: x\n", "1:9", "a value with a colon and a space in it needs quotes"),
    ("data: {sources: [*.tar]}\n", "1:18", "a value that begins with * needs quotes"),
    ("name: @x\n", "1:7", "a value that begins with @ needs quotes"),
    ("name: x\nseed = 1\n", "2:1", "write a colon and a space, no ="),
    ("name: x\n---\nname: y\n", "2:1", "a second recipe begins at ---"),
    ("name = x\nseed = 1\n", "1:1", "a recipe is a mapping of keys to values, such as `name: mine`"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "place", "cause"), YAML, ids=[each[0] for each in YAML])
def test_yaml__line_mark_and_likely_cause(
    text: str, place: str, cause: str, here: Path, distill: Run
) -> None:
    (here / "y.yaml").write_bytes(text.encode())
    code, _, err = distill("check", "y.yaml")
    assert code == 2
    assert err.startswith(f"y.yaml:{place}: ") and cause in err.splitlines()[0]
    if not cause.startswith("a recipe"):
        line, column = map(int, place.split(":"))
        _, shown, mark, fix = err.splitlines()
        assert shown.startswith(f"{line:6} | ") and len(mark) == len("       | ") + column
        assert fix.startswith("Fix: ")


# Words of a command: what the answer must hold
WORDS = [
    ("check r.yaml --schedule.batch=16", "without dashes", "Fix: Write schedule.batch=16."),
    ("check r.yaml --schedule.batch 16", "without dashes", "Fix: Write schedule.batch=16."),
    ("train r.yaml --batch 16", "without dashes", "Fix: Write schedule.batch=16."),
    ("train r.yaml --lr=1e-3", "without dashes", "Fix: Write schedule.lr=1e-3."),
    ("train r.yaml --steps", "without dashes", "Fix: Write schedule.steps=VALUE."),
    ("check r.yaml -- --schedule.batch=16", "write schedule.batch=16, without dashes", "Fix: "),
    ("train r.yaml --gpu 1", "no such option --gpu", "Fix: Did you mean --gpus?"),
    ("check r.yaml --jsn", "no such option --jsn", "Fix: Did you mean --json?"),
    ("check r.yaml --frobnicate", "no such option --frobnicate", "distill check --help lists: --"),
    ("train r.yaml --gpus two", "Invalid value for '--gpus'", "distill train --help has more"),
    ("train r.yaml --gpus 0", "Invalid value for '--gpus'", "distill train --help has more"),
    ("train", "Missing argument RECIPE", "Fix: Write distill train [OPTIONS]"),
    ("chekc r.yaml", "no such command 'chekc'", "Fix: Did you mean distill check?"),
    ("inspect x", "no such command 'inspect'", "Fix: Did you mean distill weights inspect?"),
    ("show r.yaml", "no such command 'show'", "distill recipes show or distill data show?"),
    ("resume r.yaml", "no such command 'resume'", "Fix: Did you mean distill train?"),
    ("r.yaml", "no such command 'r.yaml'", "distill check r.yaml, distill train r.yaml"),
    ("frobnicate", "no such command 'frobnicate'", "Fix: Give one of: "),
    ("weights inspct x", "no such command 'inspct'", "Fix: Did you mean distill weights inspect?"),
    ("data chck x", "no such command 'chck'", "Fix: Did you mean distill data check?"),
    ("check r.yml", "no such recipe file", "did you mean 'r.yaml'?"),
    ("check pictures", "no such recipe file", "Fix: Give a file, or one of: "),
    ("check r.yaml schedule.batch 16", "write schedule.batch=16, with = and without spaces", "Fix: "),
    ("check r.yaml schedule.batch = 16", "write schedule.batch=16, with = and without", "Fix: "),
    ("check r.yaml schedule.batch= 16", "write schedule.batch=16, with = and without", "Fix: "),
    ("check r.yaml schedule.batch =16", "write schedule.batch=16, with = and without", "Fix: "),
    ("check r.yaml schedule.batch:16", "write schedule.batch=16, with = and not :", "Fix: "),
    ("check r.yaml schedule.batch", "write KEY=VALUE, such as schedule.batch=32", "Fix: "),
    ("check r.yaml schedule.batch=", "no value: write schedule.batch=VALUE, or", "Fix: "),
    ("check r.yaml =3", "write KEY=VALUE, such as", "Fix: "),
    ("check r.yaml other.yaml", "one recipe at a time", "Fix: "),
    ("check r.yaml seed=1 seed=2", "override 'seed=2': given twice, 1 and 2: keep one", "Fix: "),
    ("check r.yaml schedule.lr.peak=1 schedule.lr={peak:2}", "replaces schedule.lr.peak=1", "Fix: "),
    ("check r.yaml --data nowhere", "--data nowhere: not a folder", "Fix: "),
    ("weights inspect pictures", "pictures: a folder of 2 pictures, not weights", "data check pictures"),
    ("weights inspect pictures/cat/one.png", "one.png: a picture, not weights", "Fix: Give a folder"),
    ("weights inspect r.yaml", "r.yaml: a recipe, not weights", "Fix: Give a folder"),
    ("weights inspect nowhere", "nowhere: no such file or folder", "Fix: Check the path."),
    ("weights inspect empty", "empty: an empty folder, not weights", "Fix: Give one with"),
    ("weights inspect run", "run: a run folder, not weights", "such as run/students/small"),
    ("eval nowhere", "nowhere: not a run folder", "Fix: Give a folder such as"),
    ("watch pictures", "pictures: not a run folder", "Fix: Give a folder such as"),
    ("export pictures --to hf", "pictures: not a run folder", "Fix: Give a folder such as"),
    ("data check nowhere", "nowhere: no such file or folder", "Fix: Give folders with images"),
    ("data pack pictures", "give the sources and then the folder", "data pack --help has more"),
    ("data pack nowhere out", "nowhere: no such file or folder", "Fix: Give folders with images"),
    ("data show r.yaml schedule.batch 16", "write schedule.batch=16, with =", "Fix: "),
    ("plan r.yaml --device gpu", "--device gpu: not known", "Fix: Choose one of"),
    ("explain schedule.lr.paek", "did you mean 'schedule.lr.peak'?", "Fix: "),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected", "fix"), WORDS, ids=[each[0] for each in WORDS])
def test_words__exit_code_2_with_what_is_wrong_and_the_next_move(
    line: str, expected: str, fix: str, here: Path, distill: Run
) -> None:
    (here / "empty").mkdir()
    (here / "run" / "students" / "small").mkdir(parents=True)
    (here / "run" / "job.json").write_text(json.dumps({}))
    (here / "run" / "students" / "small" / "config.json").write_text("{}")
    code, out, err = distill(*line.split(" "))
    assert (code, out) == (2, "")
    assert expected in err and fix in err
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize(
    "words",
    [
        ("seed=1", "seed=1"),  # twice the same
        ("schedule.lr={peak: 1e-3}", "schedule.lr.warmup=2"),  # the group first
        ("name='a b'",),
        ("engine.ranks_per_node=null",),
        ("teacher:seed=1", "seed=2"),
    ],
)
def test_words__that_are_right(words: tuple[str, ...], here: Path, distill: Run) -> None:
    code, _, err = distill("check", "r.yaml", *words)
    is_name = words[0].startswith("name")
    assert ("use letters, digits" in err and code == 2) if is_name else (code == 0)
