"""A run knows its data again: changed files, and files at another place."""

import json

import pytest

from eval import evaluate
from sigattn.data import kept_classes
from sigattn.training import run_dir
from tests.data import idx, pictures
from tests.data.test_kept_tokenizer import forget, make
from tests.training.test_run_dir import finish_a_step
from train import train


def goes_on(run, config):
  """Begins a run or raises what train would; it does not train.

  A line of metrics stands for the first step, without which it may be replaced.
  """
  forget()
  config = run_dir.validated(config, run)
  with run_dir.RunDir(run, config) as folder:
    folder.begin()
  finish_a_step(run)


def test_changed_texts_are_refused_and_moved_ones_go_on(
  texts, run, monkeypatch, capsys
):
  monkeypatch.chdir(run.parent)
  values = {"eval.length_factors": ()}
  done = json.loads((run / "DONE.json").read_text())
  for name in ("my/texts/", "./my/texts", str(texts)):
    goes_on(run, make(name, **values))
  (texts / "0.txt").write_text("0: the mat sat on the cat")  # the same alphabet
  (texts / "1.txt").rename(texts / "1b.txt")
  (texts / "notes.pdf").write_text("is not read")
  said = (
    r"config\.data\.source='my/texts' is not what the run began with: "
    r"1 changed \('0\.txt'\), 1 missing \('1\.txt'\), 1 new \('1b\.txt'\)"
  )
  forget()
  with pytest.raises(ValueError, match=said):
    train(make("my/texts", total_steps=3, **values), run)
  capsys.readouterr()
  evaluate(run)
  assert "1 changed ('0.txt')" in capsys.readouterr().out
  # It goes on where the old texts are now, and is evaluated there.
  (texts / "0.txt").write_text("0: the cat sat on the mat")
  (texts / "1b.txt").rename(texts / "1.txt")
  place = texts.rename(run.parent / "elsewhere")
  with pytest.raises(ValueError, match=r"any more.*--config\.data\.source="):
    train(make(run_dir.read_config(run).data.source, **values), run)
  # The flag was forgotten, or names a place that does not exist.
  for name in ("kjv", "my/texts"):
    said = rf"source='{name}'; the run .* has '.*texts'\. Repeat all flags"
    with pytest.raises(ValueError, match=said):
      train(make(name, **values), run)
  with pytest.raises(ValueError, match="any more: --source="):
    evaluate(run)
  with pytest.raises(ValueError, match="source='/no'; there is no such file"):
    evaluate(run, source="/no")
  assert not capsys.readouterr().out
  results = evaluate(run, source=str(place))
  assert results["loss"] == pytest.approx(done["loss"], rel=1e-6)
  assert "began with" not in capsys.readouterr().out
  goes_on(run, make(place, **values))
  assert run_dir.read_config(run).data.source == str(place)
  # A new character has no token.
  for file in place.glob("*.txt"):
    file.write_text(f"{file.stem}: a zoo")
  with pytest.raises(
    ValueError, match=r"\['z'\] are unknown; .*tokenizer=bytes"
  ):
    evaluate(run)
  assert "What is there now is evaluated" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"garbage", b'{"source": 3}', None])
def test_damaged_checksums_are_named_and_written_anew(
  content, texts, run, monkeypatch, caplog
):
  monkeypatch.chdir(run.parent)
  file = run / "data.json"
  file.unlink() if content is None else file.write_bytes(content)
  config = make("my/texts", **{"eval.length_factors": ()})
  said = f"{file}: " + ("No such file" if content is None else "unreadable: ")
  evaluate(run)
  assert said in caplog.text
  caplog.clear()
  goes_on(run, config)
  assert said in caplog.text
  assert "the run began with is not known" in caplog.text
  caplog.clear()
  # From here on, changes are noticed again.
  goes_on(run, config)
  assert not caplog.text
  (texts / "0.txt").write_text("0: the mat sat on the cat")
  with pytest.raises(ValueError, match=r"1 changed \('0\.txt'\)"):
    goes_on(run, config)


def written(run):
  """The results of other data. A long path is cut in the name of a file."""
  return [json.loads(path.read_text()) for path in run.glob("eval_*.json")]


def test_other_texts_are_evaluated_whole(run, texts, tmp_path, caplog, capsys):
  """Only data with files of the run keep the part that is held out."""
  caplog.set_level("INFO", "sigattn.data")
  own = evaluate(run, source=str(texts))
  assert (own["split"], own["source"]) == ("test", str(texts))
  before = (run / "eval.json").read_text()
  assert json.loads(before) == own
  one, many = tmp_path / "one", tmp_path / "many"
  for folder, count in ((one, 1), (many, 30)):
    folder.mkdir()
    for i in range(count):
      (folder / f"{i}.txt").write_text(f"{i}: a mat sat on the cats")
  file = tmp_path / "a.txt"
  file.write_text("the cat sat on the mat " * 20)
  for source, said in (
    (one, "1 of 1 documents are evaluated"),
    (many, "30 of 30 documents are evaluated"),
    (file, "all 460 characters are evaluated"),
  ):
    results = evaluate(run, source=str(source))
    assert (results["split"], results["source"]) == ("all", str(source))
    assert "is evaluated, the split 'all'" in capsys.readouterr().out
    assert f"{str(source)!r}: {said}" in caplog.text
    assert results in written(run)
  assert (run / "eval.json").read_text() == before
  # A split that is asked for is made as for the run's own data.
  evaluate(run, "train", source=str(many))
  assert "is evaluated, the split 'train'" in capsys.readouterr().out
  assert "files of the run" not in caplog.text
  # Some of these documents were trained on.
  (texts / "0.txt").write_text("0: the mat sat on the cat")
  results = evaluate(run, source=str(texts))
  assert results["split"] == "test"
  assert "is evaluated, the split 'test'" in capsys.readouterr().out
  kept = len(list(texts.glob("*.txt"))) - 1
  assert f"{kept} files of source={str(texts)!r} are files of" in caplog.text
  assert "may contain what the run was trained on" in caplog.text
  # One text of the run is cut, and the log says how much of it is evaluated.
  part = texts / "1.txt"
  evaluate(run, "train_without_validation", source=str(part))
  assert f"1 files of source={str(part)!r} are files of" in caplog.text
  size = len(part.read_text())
  said = f"'train_without_validation' is {size - 2} of {size} characters"
  assert said in caplog.text
  assert (run / "eval.json").read_text() == before


def test_other_texts_with_splits_of_their_own_keep_them(run, tmp_path, capsys):
  for split in ("train", "dev"):
    (tmp_path / f"{split}.jsonl").write_text('{"text": "the cat sat"}')
  with pytest.raises(ValueError, match=r"split='test' .*'train', 'validation'"):
    evaluate(run, source=str(tmp_path))
  # What is refused is not announced.
  capsys.readouterr()
  with pytest.raises(ValueError, match=r"split='../x' "):
    evaluate(run, "../x", source=str(tmp_path))
  assert "is evaluated" not in capsys.readouterr().out
  results = evaluate(run, "validation", source=str(tmp_path))
  assert results["split"] == "validation"
  said = capsys.readouterr().out
  assert said.count("What is there now is evaluated, the split 'vali") == 1
  assert written(run) == [results]


def test_the_trained_texts_of_a_run_with_others_to_evaluate(texts, tmp_path):
  """Their split is named, evaluated and moved as that of config.data.source."""
  held_out, run = tmp_path / "good.jsonl", tmp_path / "run"
  held_out.write_text('{"text": "the cat sat"}\n')
  train(make(texts, "bytes", **{"data.eval_source": str(held_out)}), run)
  own = evaluate(run)
  assert own["source"] == str(held_out)
  results = evaluate(run, "train")
  assert results["source"] == str(texts)
  assert results["loss"] != own["loss"]
  moved = evaluate(run, "train", source=str(texts.rename(tmp_path / "moved")))
  assert moved["loss"] == results["loss"]
  with pytest.raises(ValueError, match="split='foo' .*'test', 'train'"):
    evaluate(run, "foo")
  assert not (run / "eval_foo.json").exists()


def test_names_of_results_of_other_data(run, tmp_path, monkeypatch):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  text = "the cat sat on the mat " * 20
  (tmp_path / "two.txt").write_text(text)
  (tmp_path / "here" / "two.txt").write_text(text * 2)
  names = set()
  for source in ("two.txt", "../two.txt", str(tmp_path / "two.txt")):
    before = {*run.iterdir()}
    evaluate(run, source=source)
    [path] = {*run.iterdir()} - before
    names.add(path.name)
    assert json.loads(path.read_text())["source"] == source
  assert "eval_two.txt.json" in names
  assert not [x for x in names if x.startswith("eval_-") or ".." in x]


def mixed(texts, share):
  values = {"mixture": ((str(texts), share),), "eval_source": str(texts)}
  return make("", "bytes", **{f"data.{x}": y for x, y in values.items()})


def test_a_source_that_was_exchanged_for_another_is_refused(texts):
  bible = make("kjv", "bytes")
  for config, other, said in (
    (bible, make(texts, "bytes"), "data.source='kjv', not with '"),
    (bible, mixed(texts, 1.0), "data.source='kjv', not with ''"),
    (mixed(texts, 1.0), mixed(texts, 2.0), "data.mixture="),
  ):
    run = texts.parents[1] / f"run of {len(said)}"
    goes_on(run, config)
    with pytest.raises(ValueError, match=f"trained with config.{said}"):
      goes_on(run, other)


def test_the_names_of_classes_are_kept_and_others_are_refused(folder, tmp_path):
  config, run = (
    pictures.local(folder, **{"data.image_size": 14}),
    tmp_path / "r",
  )
  goes_on(run, config)
  assert kept_classes.read(run) == ["cat", "dog"]
  assert json.loads((run / "classes.json").read_text()) == ["cat", "dog"]
  for path in folder.glob("*/cat"):
    path.rename(path.with_name("zebra"))
  said = (
    r"lacks 'cat' and has in addition 'zebra', compared with .*classes\.json"
  )
  with pytest.raises(ValueError, match=said):
    evaluate(run)
  said = r"5 missing \('test/cat/0.*\), 5 new \('test/zebra.* their old names"
  with pytest.raises(ValueError, match=said):
    goes_on(run, config)


def test_changed_images_are_refused(folder, tmp_path):
  """Image folders and the files of MNIST; hidden files do not count."""
  mnist = idx.write(tmp_path / "mnist", train=20, test=10)
  plain = {"data.source": str(mnist), "data.num_classes": 10}
  for config, file in (
    (pictures.local(folder, **{"data.image_size": 14}), "train/cat/0.png"),
    (pictures.make(**plain), "t10k-labels-idx1-ubyte"),
  ):
    source = tmp_path / config.data.source
    run = tmp_path / f"run of {source.name}"
    goes_on(run, config)
    (source / ".DS_Store").write_text("hidden")
    goes_on(run, config)
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"1 changed \('{file}'\)"):
      goes_on(run, config)
