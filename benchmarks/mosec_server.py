"""The peer that one would build by hand: mosec before an exported model. MODEL names the folder, RUNS what runs it; the rest is mosec's own command line."""
import os
from pathlib import Path
from typing import Any

import numpy as np
from mosec import Server, Worker


class Plain(Worker):
    "onnxruntime and tokenizers, one thread, one row a call, nothing else."

    def __init__(self) -> None:
        import json

        import onnxruntime
        from tokenizers import Tokenizer

        folder, options = Path(os.environ["MODEL"]), onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        settings = json.loads((folder / "runtime.json").read_text())
        self.inputs, self.classes = settings["inputs"], settings["classes"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(settings["max_length"])
        self.tokenizer.no_padding()

    def forward(self, data: Any) -> Any:
        row = self.tokenizer.encode(data["text"])
        table = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
        logits = self.session.run(["logits"], {name: np.array([table[name]], dtype=np.int64) for name in self.inputs})[0][0]
        scores = np.exp(logits - logits.max())
        best = int(scores.argmax())
        return {"predictions": [{"label": self.classes[best], "score": float(scores[best] / scores.sum())}]}


class Shipped(Worker):
    "The engine that textrelay's endpoint runs, one thread, one row a call."

    def __init__(self) -> None:
        from textrelay.runtime import ExportedClassifier

        self.model = ExportedClassifier(os.environ["MODEL"])

    def forward(self, data: Any) -> Any:
        scores = self.model.predict_proba([data["text"]])[0]
        best = int(scores.argmax())
        return {"predictions": [{"label": str(self.model.classes_[best]), "score": float(scores[best])}]}


if __name__ == "__main__":
    server = Server()
    server.append_worker({"plain": Plain, "shipped": Shipped}[os.environ["RUNS"]], num=2)
    server.run()
