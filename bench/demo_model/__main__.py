"""Train the demo model and put it in place.

    python -m bench.demo_model --stage vae --minutes 22
    python -m bench.demo_model --stage transformer --minutes 70
    python -m bench.demo_model --stage decoder --minutes 8
    python -m bench.demo_model --stage export

Each stage is seeded, writes its state and a JSONL log below `--work` (default out/train), and continues from there
with `--resume`; `--minutes` is a stage's total, so a stage stopped half-way finishes with the same command and
`--resume`. Where `--work` holds nothing, `--resume` starts from the bundled weights.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command above."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=["vae", "transformer", "decoder", "export"], required=True)
    parser.add_argument("--minutes", type=float, default=22.0, help="wall time of the stage, in total")
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="folder for states and logs")
    parser.add_argument("--output", type=Path, help="export: the model folder (default: the bundled one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    if options.stage == "export":
        from bench.demo_model.export import export_model
        from kvlock_fast.models.bundled import model_path

        print(export_model(options.work, options.output or model_path()))
        return
    from bench.demo_model.workers import run_workers

    settings = {"minutes": options.minutes, "seed": options.seed, "resume": options.resume}
    if options.stage == "transformer":
        from bench.demo_model.train_transformer import train_transformer as train
    else:
        from bench.demo_model.train_vae import train_vae

        train = partial(train_vae, decoder_only=options.stage == "decoder")
    run_workers(options.workers, partial(train, work=options.work, **settings))


if __name__ == "__main__":
    main()
