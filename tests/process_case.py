"""`jrm_jax.main` that writes down which examples stand in the rows of this process.

    python tests/process_case.py FOLDER --config=... (arguments of jrm_jax.main)

FOLDER/PROCESS.jsonl gets a line [step, [ids]] for every training batch placed on the devices.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    import jax

    from jrm_jax import main, train

    class Recorder(train.build_data.BatchIterator):
        """The training batches, whose ids are written down as they are taken."""

        def __init__(self, batches, step):
            super().__init__(batches._iterator)
            self.step = step

        def __next__(self):
            batch = super().__next__()
            with (folder / f"{jax.process_index()}.jsonl").open("a") as out:
                out.write(json.dumps([self.step, batch["example_index"].tolist()]) + "\n")
            self.step += 1
            return batch

    batches = train.build_data.batches

    def record(config, data, which, mesh, start=0, stop=None):
        made = batches(config, data, which, mesh, start, stop)
        return Recorder(made, start) if which == "train" else made

    train.build_data.batches = record
    main.main()
