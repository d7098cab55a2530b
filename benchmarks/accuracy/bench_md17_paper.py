"""The paper's MD17 run: TorchMD-NET with 128 channels and 6 layers, preset ``md17_paper`` (Table 7), on one molecule.

Trains as far as ``--max-time`` allows, can be continued with the same command, and tests with the best validation
weights on frames that were not trained on.

    python benchmarks/accuracy/bench_md17_paper.py --molecule aspirin --data-dir ../shared/data/md17 --max-time 3600
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train, test, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="aspirin")
    parser.add_argument("--objective", default="ndem")
    parser.add_argument("--data-dir", default=None, help="folder with the MD17 npz files; default: download them")
    parser.add_argument("--max-time", type=float, default=3600.0, help="seconds of training, earlier calls included")
    parser.add_argument("--n-test", type=int, default=None, help="test frames; default all that are left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/md17_paper"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="record to write (JSON)")
    args = parser.parse_args()

    import torch

    from ndem_zoo import NDeMTorchMDNet, load_md17
    from ndem_zoo.checkpoint import save_json

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checksum of a subset is not the official one
        _, (train, valid, test), _ = load_md17(args.molecule, data_dir=args.data_dir, n_train=950, n_valid=50, seed=1)
    if args.n_test is not None:
        test = test[: args.n_test]
    model = NDeMTorchMDNet(preset="md17_paper", objective=args.objective, device=args.device, seed=args.seed)
    model.fit(
        train,
        valid,
        max_time=args.max_time,
        nb_epoch=3000,
        checkpoint_dir=args.run_dir,
        checkpoint_every=1000,
        resume=True,
    )
    begin = time.perf_counter()
    errors = model.evaluate(test)
    last = model.history_[-1]
    is_cuda = next(model.potential_.parameters()).is_cuda
    record = {
        "command": f"python benchmarks/accuracy/bench_md17_paper.py --molecule {args.molecule} --objective "
        f"{args.objective} --data-dir DIR --max-time {args.max_time:g} --seed {args.seed}",
        "machine": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "torch": torch.__version__,
        "molecule": args.molecule,
        "objective": args.objective,
        "n_test": len(test),
        "epochs": last["epoch"],
        "epochs_of_recipe": 3000,
        "steps": last["step"],
        "seconds": last["seconds"],
        "ms_per_step": 1e3 * last["seconds"] / last["step"],
        "test_seconds": time.perf_counter() - begin,
        "test": errors,
        "history": model.history_[:: max(1, len(model.history_) // 200)],
    }
    out = args.out or RESULTS / f"md17_{args.molecule}_paper_{args.objective}.json"
    save_json(out, record)
    print({key: value for key, value in record.items() if key != "history"})


if __name__ == "__main__":
    main()
