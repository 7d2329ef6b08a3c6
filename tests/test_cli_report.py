"""`python -m crossattn_kernels report` on configurations of transformers and of diffusers."""

import json

import pytest
import transformers as tf

from crossattn_kernels import cli
from tests.diffusers_models import unet
from tests.transformers_models import build


def test_the_command_reports_a_model_a_file_and_a_pipeline(tmp_path, capsys):
    unet().save_config(tmp_path / "model")
    line = "UNet2DConditionModel: 4 of 8 attention modules run on crossattn"
    for where in (tmp_path / "model", tmp_path / "model" / "config.json"):
        assert cli.main(["report", str(where)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line
    index = dict(
        _class_name="StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"], tokenizer=[None, None]
    )
    (tmp_path / "model").rename(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for where in (tmp_path, tmp_path / "model_index.json"):
        assert cli.main(["report", str(where)]) == 0
        *rows, last = capsys.readouterr().out.splitlines()
        assert last == line.replace("UNet2DConditionModel", "StableDiffusionPipeline")
        assert sum(row.startswith("unet.") for row in rows) == 8


@pytest.mark.parametrize(
    "config",
    [
        dict(_class_name="NoSuchModel"),
        dict(_class_name="DDIMScheduler"),
        dict(_class_name="UNet2DConditionModel", block_out_channels=3),
        ["_class_name"],
        dict(model_type="bart", d_model="wide"),
        dict(model_type="bart", architectures=[3]),
    ],
)
def test_the_command_refuses_in_one_sentence(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for where in (tmp_path, tmp_path / "absent"):
        assert cli.main(["report", str(where)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_reports_a_model_of_transformers(tmp_path, capsys):
    model, _ = build("bart")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    by_folder = capsys.readouterr().out
    assert by_folder.splitlines()[-1] == "BartForConditionalGeneration: 2 of 5 attention modules run on crossattn"
    assert cli.main(["report", str(tmp_path / "config.json")]) == 0
    assert capsys.readouterr().out == by_folder


def test_the_command_says_what_is_wrong_with_a_model_of_transformers(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    for where in (tmp_path, tmp_path / "absent"):
        assert cli.main(["report", str(where)]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and str(where) in error
    tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(
        tmp_path
    )
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "0 of 1 attention modules run on crossattn" in capsys.readouterr().out
