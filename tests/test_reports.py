"""The table says who runs where, aligned, and counts."""

import torch

from crossattn_kernels.integrations import reports
from crossattn_kernels.integrations.reports import Report, Row, runs_here

ROWS = (
    Row("down.attn2", "Attention", "cross", "crossattn (torch)"),
    Row("mid", "Attention", "self", "sdpa", "no text"),
)


def test_a_report_reads_as_an_aligned_table():
    assert str(Report("UNet", ROWS)).splitlines() == [
        "module      class      kind   runs on            why",
        "down.attn2  Attention  cross  crossattn (torch)",
        "mid         Attention  self   sdpa               no text",
        "UNet: 1 of 2 attention modules run on crossattn",
    ]


def test_a_report_knows_what_runs_here():
    assert Report("UNet", ROWS).here == ROWS[:1]
    assert not Row("a", "B", "cross", "crossattention of somebody else").is_here


def test_a_model_without_attention_has_a_report_too():
    assert str(Report("Linear", ())) == "Linear: 0 of 0 attention modules run on crossattn"


def test_a_model_on_meta_is_reported_as_it_will_run(monkeypatch):
    assert runs_here(torch.device("meta")) == runs_here(torch.device("cpu")) == "crossattn (torch)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reports, "choose", lambda kind, backend: f"{kind[0]}, D {kind[2]}")
    assert runs_here(torch.device("meta"), size=40) == "crossattn (cuda, D 40)"
