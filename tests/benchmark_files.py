"""Small benchmarks on disk, in the layouts of the published ones, with their oddities."""

import io
import json

import numpy as np
import PIL.Image

LETTERS = "ABCD"
TASKS = (
    "background_change", "color_alter", "style_change", "subject-add", "subject-remove",
    "subject-replace", "material_alter", "motion_change", "ps_human", "text_change",
    "tone_transfer", "extract", "compose",
)  # fmt: skip


def png(seed, size=(32, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(folder, count, size=(32, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for seed in range(count):
        (folder / f"{seed}.png").write_bytes(png(seed, size))
        names.append(f"{folder.name}/{seed}.png")
    return names


def write_mmrb2(folder):
    """Four tasks: text only, several pictures per prompt and per answer, an empty answer."""
    names = pictures(folder / "images", 6)
    shapes = {
        "t2i": ([["text", "A cat <|image_pad|>"]], [["image", names[0]]], [["image", names[1]]]),
        "edit": (
            [["text", "Make it <|reward|> white"], ["image", names[0]], ["image", names[2]]],
            [["image", names[1]]], [["image", names[3]]],
        ),
        "interleaved": (
            [["text", "Tell a story"]],
            [["text", "First"], ["image", names[1]], ["text", "then"], ["image", names[2]]],
            [["text", "Only words"]],
        ),
        "reasoning": ([["image", names[4]], ["text", "How many?"]], [["text", "Two"]], []),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for task, (prompt, first, second) in shapes.items():
        pairs = [
            {
                "id": f"{task}_{i}",
                "prompt_source": ("emu-edit", "dreambench")[i % 2],
                "prompt_content": [["text", f"{i}"], *prompt][: None if i % 3 else 2],
                "prompt_metadata": {},
                "response_a": {"model_name": "m1", "response_content": first},
                "response_b": {"model_name": ("m1", "m2")[i % 2], "response_content": second},
                "chosen": "AB"[int(rng.integers(2))],
                "human_annotations": [],
            }
            for i in range(7)
        ]
        for pair in pairs:
            pair["human_annotations"] = [5, 4, 6] if pair["chosen"] == "A" else [1, 2, 3]
        (folder / f"{task}.json").write_text(json.dumps({"pairs": pairs}))
    return folder


def judge_mmrb2(folder, out, seed=0):
    """Predictions of a noisy judge: missing ids, missing orders, answers that are neither."""
    out.mkdir()
    rng = np.random.default_rng(seed)
    for task in ("t2i", "edit", "interleaved", "reasoning"):
        pairs = json.loads((folder / f"{task}.json").read_text())["pairs"]
        content = {"unknown_id": {"forward": [{"judgement": "A"}], "reverse": []}}
        for i, pair in enumerate(pairs):
            if i == 3:
                continue
            sides = {
                side: [{"judgement": str(rng.choice(["A", "B", "tie"], p=[0.5, 0.4, 0.1])),
                        "evaluator": "noisy", "metadata": {}}]
                for side in ("forward", "reverse")
            }  # fmt: skip
            if i == 4:
                sides["reverse"] = []
            if i == 5:
                sides["forward"][0]["judgement"] = None
            content[pair["id"]] = sides
        (out / f"{task}.json").write_text(json.dumps(content))
    return out


def editscore_rows(count=2, bytes_too=True):
    """Rows of EditScore's benchmark: 13 subtasks, three dimensions, edits of another size."""
    rows = []
    for t, task in enumerate(TASKS):
        for i in range(count + t % 2):
            edits = [png(100 * t + i + k, (16, 40)) for k in (1, 2)]
            for dimension in ("prompt_following", "consistency", "overall"):
                key = [f"{task}_{i}_x", f"{task}_{i}_y"]
                rows.append(
                    {
                        "key": key if (i + len(dimension)) % 2 else key[::-1],
                        "instruction": f"Edit {i} of {task}",
                        "input_image": {"bytes": png(100 * t + i), "path": "in.png"},
                        "output_images": [{"bytes": e, "path": None} for e in edits],
                        "task_type": task,
                        "dimension": dimension,
                    }
                )
    return rows


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_arrow(folder, rows, shards=2, stream=True):
    """A folder as `Dataset.save_to_disk` leaves it, and what a later `map` adds to it."""
    import pyarrow

    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    cut = -(-len(rows) // shards)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    for start, name in zip(range(0, len(rows), cut), names, strict=True):
        with make(str(folder / name), table.schema) as writer:
            writer.write_table(table.slice(start, cut), max_chunksize=5)
    (folder / "cache-1b2c.arrow").write_bytes((folder / names[0]).read_bytes())
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    state = {"_data_files": [{"filename": name} for name in names], "_split": "test"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def judge_editscore(rows, out, seed=0):
    """Integer scores, so that some are equal; one line twice, as an appended re-run leaves it."""
    rng = np.random.default_rng(seed)
    for idx, row in enumerate(rows):
        path = out / row["task_type"] / f"{row['dimension']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": row["key"], "idx": idx, "score": rng.integers(0, 4, 2).tolist(),
                "SC_reasoning": ["", ""], "PQ_reasoning": ["", ""]}  # fmt: skip
        with path.open("a") as file:
            file.write((json.dumps(line) + "\n") * (2 if idx == 0 else 1))
    return out


def write_tiger(folder):
    """The three JSON files; ties, a bare 'A=B', 'A<B', an unreadable ranking, a missing picture."""
    names = pictures(folder / "images", 12)
    rankings = {
        2: ["A>B", "B>A", "A=B=Good", "A=B=Bad", "A=B", "A<B", "B>A"],
        3: ["A>B>C", "C>A>B", "B>A>C", "A>B=C", "C>B>A"],
        4: ["A>B>C>D", "D>C>B>A", "B>D>A>C"],
    }
    for size, texts in rankings.items():
        groups = [
            {
                "prompt": f"Edit {size} {i}",
                "path_src": names[i],
                "paths_generated": [names[(i + k) % 12] for k in range(1, size + 1)],
                "human_vote": {"ranking": text, "preference": text},
            }
            for i, text in enumerate(texts)
        ]
        if size == 4:
            groups[-1]["paths_generated"][0] = "images/gone.png"
        (folder / f"EditReward_Bench_{size}pair.json").write_text(json.dumps(groups))
    return folder


def tiger_log(folder, out, seed=0):
    """A detailed log as eval_bench.py writes it, scores of a noisy model, some equal."""
    rng = np.random.default_rng(seed)
    logs = []
    for size in (2, 3, 4):
        groups = json.loads((folder / f"EditReward_Bench_{size}pair.json").read_text())
        for i, group in enumerate(groups):
            scores = np.round(rng.normal(size=size), 1)
            scores = scores * 0 if i == 1 else scores
            logs.append(
                {
                    "file_name": f"{size}-Pair",
                    "sample_index": i,
                    "prompt": group["prompt"],
                    "ground_truth": group["human_vote"]["preference"],
                    "strict_accuracy_correct": False,
                    "model_outputs": [
                        {"path": path, "score": float(score), "predicted_rank": 1}
                        for path, score in zip(group["paths_generated"], scores, strict=True)
                    ],
                }
            )
    out.write_text(json.dumps(logs))
    return out


def tiger_rows():
    """Hugging Face rows: all pairs of a group; a duplicated id with opposite rankings in 2pair."""
    rows = []

    def add(name, data, kind, ranking, seed):
        rows.append(
            {
                "id": name, "dataset": data, "instruction": f"Edit {seed}",
                "source_image": {"bytes": png(seed), "path": None},
                "candidate_1": {"bytes": png(seed + 10 + LETTERS.index(kind[0])), "path": None},
                "candidate_2": {"bytes": png(seed + 10 + LETTERS.index(kind[-1])), "path": None},
                "comparison_type": kind, "ranking": ranking,
            }
        )  # fmt: skip

    for name, ranking, seed in (("p0", "A>B", 0), ("p1", "A=B", 1), ("p0", "B>A", 0)):
        add(name, "2pair", "AvsB", ranking, seed)
    for group, order in (("g1", "CAB"), ("g2", "ABC")):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = LETTERS[i], LETTERS[j]
            words = f"{a}>{b}" if order.index(a) < order.index(b) else f"{b}>{a}"
            add(f"{group}_{i}{j}", "3pair", f"{a}vs{b}", words, 30 + ord(group[1]))
    return rows


def write_pairs(folder, ties=True):
    names = pictures(folder / "images", 9)
    rows = [
        {
            "prompt": f"Edit {i}", "path_src": names[i], "path1": names[i + 1],
            "path2": names[i + 2], "model1": "a", "model2": "b",
            "model1_dim1_score": (4, 2, 3)[i % 3], "model2_dim1_score": (2, 4, 3)[i % 3],
        }
        for i in range(7)
    ]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(rows if ties else rows[:1]))
    return folder / "pairs.json"


def write_ratings(folder, columns=("instruction", "input_path", "output_path")):
    """Three editors with a rating per edit; the scores of the last one do not vary."""
    names = pictures(folder / "images", 12)
    text, source, edit = columns
    rows = [
        {text: f"Edit {i}", source: names[i], edit: names[i + 1 + m], "model": f"editor{m}",
         "score": 1.0 if m == 2 else float((i * (m + 2)) % 5), "filename": f"{i}_{m}.png"}
        for m in range(3) for i in range(6)
    ]  # fmt: skip
    (folder / "ratings.json").write_text(json.dumps(rows))
    return folder / "ratings.json"
