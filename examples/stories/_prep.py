import sys
from pathlib import Path
from tokenizers import Tokenizer
from examples.stories import train
if __name__ == "__main__":
    args = train.parse_args(["--out", "x", "--cache", sys.argv[1], "--documents", "360000", "--short-documents", "160000"])
    r = train.load_documents(args, Tokenizer.from_file("examples/stories/_tok.json"))
    print([x.shape for y in r for x in y])
