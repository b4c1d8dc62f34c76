"""A session: a run of a few lines, as in a notebook; averages by name; parts of a loss in the log."""

import json
from types import SimpleNamespace

import numpy as np
import paddle
from support.runs import TINY_MODELS

from config.schema import resolve_config
from features.loader import FeatureLoader
from objectives import Batch, Rows
from training import EMA
from training.checkpoints.experiment import open_checkpoint
from training.metrics import TrainingLog
from training.session import Outputs, Session, build_session
from training.setup import open_data


def make_session(features, folder, steps=2, **options):
    config = resolve_config({"model": TINY_MODELS["DiT"], "training": {"global_batch_size": 8, "max_steps": steps}})
    data = open_data(config, str(features))
    return build_session(config, data, str(folder), outputs=Outputs(log_every=1, show_bar=False), **options)


def train(session):
    batches = iter(FeatureLoader(session.dataset, session.sampler, num_workers=0))
    for step in range(session.first_step + 1, session.last_step + 1):
        losses = session.objective.training_losses(session.model, Batch(*next(batches)), Rows(0, 8, 8))
        loss = losses["loss"].mean()
        loss.backward()
        session.add_losses(loss, losses)
        session.begin_update(step)
        session.optimizer.step()
        session.end_update()
        session.optimizer.clear_grad()
        session.after_step(step)
    session.close("")


def test_a_run_in_a_notebook(features, tmp_path):
    session = make_session(features, tmp_path / "out").start()
    train(session)
    saved = open_checkpoint(tmp_path / "out" / "checkpoints", session.config)
    assert saved.progress["global_step"] == 2 and list(saved.averages) == [""]
    for name, parameter in session.model.named_parameters():
        np.testing.assert_array_equal(saved.model[name], parameter)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all("loss_" not in key for row in rows for key in row)


def test_averages_have_names_in_a_checkpoint(features, tmp_path, monkeypatch):
    start = Session.start

    def with_two(self):
        self.averages = [EMA(self.model, 0.5), EMA(self.model, 0.9, name="slow")]
        return start(self)

    monkeypatch.setattr(Session, "start", with_two)
    session = make_session(features, tmp_path / "out").start()
    train(session)
    folder = tmp_path / "out" / "checkpoints" / "0000002"
    assert {path.name for path in folder.glob("ema*")} == {"ema_state.pdparams", "ema_state_slow.pdparams"}
    from training.checkpoints.state import restore_model

    model = make_session(features, tmp_path / "other").model
    again = [EMA(model, 0.5), EMA(model, 0.9, name="slow")]
    restore_model(open_checkpoint(folder, session.config), model, again)
    for before, after in zip(session.averages, again, strict=True):
        assert after.num_updates == 2
        for name, value in before.state_dict().items():
            np.testing.assert_array_equal(after.state_dict()[name], value)
    assert any((a != b).any() for a, b in zip(*(average.state_dict().values() for average in again), strict=True))


def test_parts_of_the_loss_are_logged_by_name(tmp_path):
    log = TrainingLog(
        tmp_path,
        visualdl_dir=str(tmp_path / "vdl"),
        log_every=1,
        first_step=0,
        last_step=1,
        global_batch_size=8,
        show_bar=False,
    )
    log.step_done(1)
    log.report(loss=1.5, lr=0.1, grad_norm=1.0, epoch=0.1, parts={"dispersive": 0.25})
    log.close()
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (row["loss"], row["loss_dispersive"]) == (1.5, 0.25)


def test_parts_reach_the_watch_under_their_names(features, tmp_path, monkeypatch):
    session = make_session(features, tmp_path / "out").start()
    got = []
    session.objective.regularizers = [SimpleNamespace(name="contrastive", sign=-1, weight=0.5)]
    monkeypatch.setattr(session.numbers, "add", lambda *values: got.append(values))
    losses = {"loss": paddle.to_tensor([1.0, 3.0]), "contrastive": paddle.to_tensor([0.5, 1.5])}
    session.add_losses(losses["loss"].mean(), losses)
    ((loss, parts),) = got
    assert float(loss) == 2.0 and list(map(float, parts.values())) == [2.5, 1.0]
    assert list(parts) == ["objective", "contrastive"]
