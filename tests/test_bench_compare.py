"""The comparison's referee with contenders of a few lines, and the files made for other engines."""

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def contender(name: str, body: str, kind: str = "float32", engine: str = "other"):
    from contenders.referee import Contender

    return Contender(name, kind, engine, 1, 1, (sys.executable, "-c", body))


SPEAKING = """
import json, sys
print(json.dumps({"ready": True, "about": "x"}), flush=True)
for line in sys.stdin:
    steps = int(line.split()[2])
    print(json.dumps({"ms": [MS] * steps, "token_ids": [7] * steps}), flush=True)
"""


def speaking(ms: float) -> str:
    return SPEAKING.replace("MS", str(ms))


def decode_task(steps: int = 6):
    from contenders.referee import Task, step_ms

    return Task("decode", 1, steps, (1, 2, 3), step_ms)


def compete(contenders, rounds=3):
    from contenders.referee import compete

    return compete(contenders, [decode_task()], rounds, None, lambda line: None)


def test_every_contender_runs_in_every_round_and_the_first_is_not_kept():
    outcome = compete([contender("slow", speaking(4.0)), contender("fast", speaking(2.0))])
    assert outcome.figures["slow"]["decode"] == [4.0] * 3
    assert outcome.figures["fast"]["decode"] == [2.0] * 3
    assert outcome.skipped == {}


def test_a_contender_that_cannot_start_or_dies_is_skipped_by_name_with_its_last_words():
    never = contender("never", "import sys; sys.exit('no such engine')")
    dies = contender(
        "dies", speaking(1.0).replace("steps =", "raise SystemExit('gone')\n    steps =")
    )
    outcome = compete([never, dies, contender("stays", speaking(2.0))])
    assert outcome.skipped == {"never": "no such engine", "dies": "gone"}
    assert list(outcome.figures) == ["stays"]


def test_the_warming_steps_and_the_prompt_are_no_part_of_a_step():
    from contenders.referee import step_ms

    assert step_ms([100.0, 50.0, 40.0, 2.0, 3.0, 4.0]) == 3.0


def test_ratios_are_taken_within_a_round():
    from contenders.referee import Outcome
    from contenders.report import Heat

    ours = contender("ours", "", engine="veilpipe")
    theirs = contender("theirs", "", engine="llama.cpp")
    outcome = Outcome()
    outcome.figures["ours"]["decode"] = [1.0, 20.0, 3.0]
    outcome.figures["theirs"]["decode"] = [2.0, 40.0, 6.0]
    heat = Heat(1, [ours, theirs], outcome)
    assert heat.ratio(ours, heat.rival(ours, "llama.cpp"), "decode") == 0.5


def test_every_figure_of_every_round_is_written_as_json():
    import bench_compare
    from contenders.report import Heat

    ours = contender("ours", speaking(2.0), engine="veilpipe")
    args = bench_compare.argparse.Namespace(rounds=3, tokens=5)
    written = bench_compare.as_json([Heat(1, [ours], compete([ours]))], args, "tiny")
    assert json.loads(written)["heats"][0]["outcome"]["figures"] == {"ours": {"decode": [2.0] * 3}}


def tiny_llama(directory: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 12,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "vocab_size": 5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (5, 8), "model.norm": (8,),
        "model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.self_attn.k_proj": (4, 8),
        "model.layers.0.self_attn.v_proj": (4, 8), "model.layers.0.self_attn.o_proj": (8, 8),
        "model.layers.0.mlp.gate_proj": (12, 8), "model.layers.0.mlp.up_proj": (12, 8),
        "model.layers.0.mlp.down_proj": (8, 12), "model.layers.0.input_layernorm": (8,),
        "model.layers.0.post_attention_layernorm": (8,),
    }  # fmt: skip
    tensors = {f"{name}.weight": random.standard_normal(shape, dtype=np.float32)
               for name, shape in shapes.items()}  # fmt: skip
    save_file(tensors, directory / "model.safetensors")


def test_a_gguf_file_holds_every_tensor_and_pairs_rotated_rows(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the bench extra")
    from export_gguf import export

    tiny_llama(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.gguf", "f32")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    found = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == len(stored)
    np.testing.assert_array_equal(
        found["blk.0.ffn_down.weight"], stored["model.layers.0.mlp.down_proj.weight"]
    )
    # Two heads of four rows: transformers rotates (0, 2) and (1, 3), llama.cpp neighbours.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(
        found["blk.0.attn_q.weight"], stored["model.layers.0.self_attn.q_proj.weight"][order]
    )


def test_a_tied_embedding_counts_among_the_weights_every_token_reads(tmp_path):
    from contenders.lineup import num_weights_read

    tiny_llama(tmp_path)
    tied = num_weights_read(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert tied - num_weights_read(tmp_path) == 5 * 8


def test_the_random_model_is_the_same_every_time():
    from random_model import GPT2_124M, weights

    small = {**GPT2_124M, "n_layer": 1, "n_embd": 8, "vocab_size": 11, "n_positions": 4}
    first, second = weights(small), weights(small)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_run_that_others_disturbed_is_repeated_and_the_quietest_counts(monkeypatch):
    from contenders import referee

    shares = iter([0.0, 0.9, 0.4, 0.05, 0.0])  # the warming run is taken as it comes

    class Watch:
        def __init__(self, group):
            pass

        def others(self):
            return next(shares)

    monkeypatch.setattr(referee, "Watch", Watch)
    monkeypatch.setattr(referee, "PAUSE_SECONDS", 0)
    outcome = compete([contender("one", speaking(2.0))], rounds=2)
    assert outcome.disturbance == [0.05, 0.0]


def test_a_busy_neighbour_is_noticed_and_the_own_group_is_not():
    from contenders import quiet

    if not quiet.PROC.joinpath("stat").exists():
        pytest.skip("this system does not tell")
    spin = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(spin, start_new_session=True) as process:
        try:
            own, other = quiet.Watch(process.pid), quiet.Watch(0)
            started = quiet.group_ticks(process.pid)
            while quiet.group_ticks(process.pid) < started + 30:
                time.sleep(0.05)
            assert other.others() > own.others() + 0.05
        finally:
            process.kill()


def test_rounds_share_a_turn_and_the_lock_is_free_between_turns(tmp_path, monkeypatch):
    from contenders import referee

    def is_free():
        with (tmp_path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    clock = iter([0.0, 30.0, 61.0, 100.0, 110.0])  # taken, a round, another; taken, a round
    monkeypatch.setattr(referee, "monotonic", lambda: next(clock))
    turns = referee.Turns(tmp_path / "lock")
    for still_held in (True, False):
        with turns.round():
            assert not is_free()
        assert is_free() is not still_held
    with turns.round():
        pass
    assert not is_free()
    turns.end()
    assert is_free()
