"""Hugging Face transformers: transformers_cpu.py MODEL_DIR DTYPE THREADS.

Its own forward with its own cache in a bare loop, which spares it what `generate` adds.
"""

import sys
from pathlib import Path

import torch
import transformers
from protocol import Ask, Clock, Result, serve


def main() -> None:
    model_dir, dtype, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype)
    ).eval()

    @torch.inference_mode()
    def generate(ask: Ask) -> Result:
        clock, result = Clock(), Result()
        inputs, cache = torch.tensor([ask.prompt] * ask.rows), None
        for _ in range(ask.steps):
            output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            inputs = output.logits[:, -1:].argmax(dim=-1)
            result.token_ids.append(int(inputs[0, 0]))
            result.ms.append(clock.lap_ms())
        return result

    serve(generate, f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
