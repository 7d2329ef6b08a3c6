"""`python -m crossattn_kernels report` on configurations of diffusers; test_transformers_core.py has the other's."""

import json

import diffusers
import pytest

from crossattn_kernels import cli


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


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
