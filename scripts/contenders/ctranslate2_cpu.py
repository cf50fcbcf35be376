"""CTranslate2: ctranslate2_cpu.py CONVERTED_DIR THREADS."""

import json
import sys
from pathlib import Path

import ctranslate2
from protocol import Ask, Clock, Result, serve


def main() -> None:
    directory, threads = Path(sys.argv[1]), int(sys.argv[2])
    generator = ctranslate2.Generator(
        str(directory), device="cpu", inter_threads=1, intra_threads=threads
    )
    tokens = words(directory)

    def generate(ask: Ask) -> Result:
        clock, result = Clock(), Result()

        def on_token(step) -> bool:
            if step.batch_id == 0:
                result.token_ids.append(step.token_id)
            if step.batch_id == ask.rows - 1:
                result.ms.append(clock.lap_ms())
            return False

        generator.generate_batch(
            [[tokens[token_id] for token_id in ask.prompt]] * ask.rows,
            max_length=ask.steps,
            min_length=ask.steps,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return result

    serve(generate, f"ctranslate2 {ctranslate2.__version__}, {generator.compute_type}")


def words(directory: Path) -> list[str]:
    """Token id -> word: CTranslate2 takes and gives words."""
    return json.loads((directory / "vocabulary.json").read_text())


if __name__ == "__main__":
    main()
