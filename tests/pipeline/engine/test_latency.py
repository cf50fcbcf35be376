import json
import math

import pytest

from pipeline.engine.home_times import PARTS
from pipeline.engine.latency import LatencyLog, percentile
from pipeline.errors import InputError
from pipeline.protocol.step_header import StageTiming


@pytest.fixture
def log():
    log = LatencyLog()
    for i, ms in enumerate((50, 10, 20, 30)):
        log.add(i, ms * 1_000_000, (StageTiming(ms * 500_000, 1000, 2000),))
    return log


def test_percentiles_interpolate():
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([5], 0.95) == 5
    assert percentile([0, 10], 0.95) == pytest.approx(9.5)
    assert math.isnan(percentile([], 0.5))


def test_the_first_tokens_time_is_the_prompts(log):
    assert log.prompt_ms == 50
    assert log.latencies_ms == [10, 20, 30]
    assert "TTFT 50.0 ms, avg 20.0 ms/token, p50 20.0, p95 29.0, 50.0 tokens/s" in log.summary()


def test_the_record_names_each_stages_parts(log, tmp_path):
    path = tmp_path / "latency.json"
    log.write(path)
    record = json.loads(path.read_text())
    assert record["token_ids"] == [0, 1, 2, 3]
    assert record["generation_tokens"] == len(record["latencies_ms"]) == 4
    assert record["latencies_ms"] == [record["prompt_ms"], 10, 20, 30]
    assert record["stages"][1] == [{"compute_ms": 5.0, "crypto_ms": 0.001, "wire_ms": 0.002}]
    assert "orchestrator" not in record
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]
    assert path.stat().st_mode & 0o777 == 0o600  # the tokens are the answer


def test_parts_of_ends_that_are_held_here_are_named_beside_the_stages():
    log = LatencyLog()
    log.add(7, 50_000_000, (), {"embed": 2_000_000, "network": 500_000})
    (parts,) = log.to_json()["orchestrator"]
    assert parts["embed_ms"] == 2.0
    assert parts["network_ms"] == 0.5
    assert {name for name, ms in parts.items() if not ms} == {
        f"{part}_ms" for part in PARTS if part not in {"embed", "network"}
    }


def test_an_unwritable_path_is_one_error_and_no_file(log, tmp_path):
    with pytest.raises(InputError, match=r"none/latency\.json"):
        log.write(tmp_path / "none" / "latency.json")


def test_a_single_token_has_a_summary_too():
    log = LatencyLog()
    log.add(1, 7_000_000, ())
    assert log.summary() == "1 tokens, TTFT 7.0 ms"
