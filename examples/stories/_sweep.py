"""Temporary driver: short concurrent runs of several configurations, then a full run of the best."""
import os, sys, time, json, subprocess
from pathlib import Path
import numpy as np, torch
from examples.stories import train as T
from tokenizers import Tokenizer

TOK = "examples/stories/model/tokenizer.json"
CONFIGS = {
    "A": ["--n-heads", "8", "--n-kv-heads", "4", "--head-dim", "64", "--n-layers", "5", "--rope-theta", "500000"],
    "C": ["--n-heads", "4", "--n-kv-heads", "2", "--head-dim", "64", "--n-layers", "6", "--rope-theta", "1000000", "--lr", "2.5e-3"],
}
POOL = "/dev/shm/pool.npz" if os.path.isdir("/dev/shm") else "/tmp/pool.npz"

def run(argv):
    args = T.parse_args(argv)
    t = np.load(POOL + ".t.npy"); k = np.load(POOL + ".k.npy")
    return T.train(args, Tokenizer.from_file(TOK), torch.from_numpy(t).to(args.device), torch.from_numpy(k).to(args.device))

if __name__ == "__main__":
    if sys.argv[1] == "one":
        print("FINAL", run(sys.argv[2:])); sys.exit()
    out, dev, docs, short, s1, total = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]), float(sys.argv[6])
    extra = sys.argv[7:]
    t0 = time.time()
    args = T.parse_args(["--out", "x", "--documents", docs, "--short-documents", short])
    tok, kind = T.load_documents(args, Tokenizer.from_file(TOK))
    np.save(POOL + ".t.npy", tok.astype(np.int16)); np.save(POOL + ".k.npy", kind)
    print("pool", tok.shape, round(time.time() - t0), flush=True)
    procs = {}
    for n, c in CONFIGS.items():
        log = open(out / f"log_{n}", "w")
        cmd = [sys.executable, "-m", "examples.stories._sweep", "one", "--out", f"/tmp/{n}", "--device", dev, "--max-seconds", str(s1), *c, *extra]
        procs[n] = subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT)
    score = {}
    for n, p in procs.items():
        p.wait()
        text = (out / f"log_{n}").read_text()
        print(n, "\n".join(text.strip().splitlines()[-45:]), flush=True)
        f = [l for l in text.splitlines() if l.startswith("FINAL")]
        score[n] = float(f[0].split()[1]) if f else -1.0
    print(score, round(time.time() - t0), flush=True)
    best = max(score, key=score.get)
    os.system(f"mkdir -p {out}/m && cp /tmp/{best}/* {out}/m/")
    left = total - (time.time() - t0) - 20
    if score[best] < 0.9975 and left > 40:
        lr = ["--lr", "1e-3"]
        a = CONFIGS[best] + lr
        os.environ["PYTHONUNBUFFERED"] = "1"
        rc = subprocess.call([sys.executable, "-m", "examples.stories._sweep", "one", "--out", str(out / "m2"), "--device", dev, "--init", f"/tmp/{best}", "--max-seconds", str(left), *a, "--seed", "1", "--warmup", "100", *extra])
        print("stage 2 rc", rc, flush=True)
    print("total", round(time.time() - t0), flush=True)
