"""lm-eval scores multiple choice over the API as `transformers` does on the same weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from tests.e2e.client_commands import client_command
from tests.e2e.conftest import new_cluster

pytestmark = pytest.mark.slow

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2"
ITEMS = [
    ("The capital of France is", ["Paris", "Rome", "a kind of cheese"], 0),
    ("Water freezes at", ["zero degrees Celsius", "forty degrees", "noon"], 0),
    ("Two and two are", ["five", "four", "ündecidable"], 1),
    ("The opposite of hot is", ["warm", "cold", "hot"], 1),
    ("A year has twelve", ["months", "days", "moons and a half, as everybody knows"], 0),
    ("Question: What do bees make?\nAnswer:", ["honey", "milk", "bread", "glass"], 0),
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def write_task(directory):
    directory.mkdir()
    items = directory / "items.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in ITEMS]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "choices.yaml").write_text(TASK.format(items=items))


def run_lm_eval(directory, url, batch_size):
    """Of each item and choice: its log-likelihood, and whether it is what greedy decoding says."""
    write_task(directory / "task")
    out = directory / "out"
    arguments = (
        f"model=model,base_url={url}/v1/completions,tokenizer_backend=remote,"
        "tokenized_requests=True,num_concurrent=3,max_retries=1,max_length=512"
    )
    environment = {
        **os.environ, "HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none",
    }  # fmt: skip
    done = subprocess.run(
        [client_command("lm_eval"), "run", "--model", "local-completions",
         "--model_args", arguments, "--tasks", "choices",
         "--include_path", directory / "task", "--batch_size", str(batch_size),
         "--output_path", out, "--log_samples"],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("samples_*.jsonl")
    told = sorted(
        map(json.loads, samples.read_text().splitlines()), key=lambda each: each["doc_id"]
    )
    return [
        [(float(score), str(greedy) == "True") for score, greedy in each["filtered_resps"]]
        for each in told
    ]


def expected_of(model_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def score(question, choice):
        start, whole = len(encode(question)), encode(f"{question} {choice}")
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)[start - 1 : -1]
        told = torch.tensor(whole[start:])
        is_greedy = bool((rows.argmax(-1) == told).all())
        return float(rows.gather(1, told[:, None]).sum()), is_greedy

    return [[score(question, choice) for choice in choices] for question, choices, _ in ITEMS]


@pytest.mark.parametrize(("which", "batch_size"), [("random", 1), ("smollm2", 4)])
def test_scores_are_those_of_transformers(tmp_path, tiny_model, which, batch_size):
    model_dir = tiny_model if which == "random" else SMOLLM2
    if not model_dir.is_dir():
        pytest.skip("SmolLM2 is not there (scripts/download_model.sh)")
    (tmp_path / "cluster").mkdir()
    with new_cluster(tmp_path / "cluster", model_dir) as cluster:
        cluster.plan(2)
        extra = ("--served-model-name", "model", "--context", "512")
        server = cluster.serve("--supervise", *extra)
        found = run_lm_eval(tmp_path, server.url, batch_size)
    expected = expected_of(model_dir)
    for scores, theirs in zip(found, expected, strict=True):
        assert [each for each, _ in scores] == pytest.approx([e for e, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in theirs]
