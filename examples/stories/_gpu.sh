# usage: bash _gpu.sh SECONDS ; variants below
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
nvidia-smi --query-gpu=name --format=csv,noheader
T=/tmp/w; mkdir -p $T
time python3 -m examples.stories._prep $T/cache.npz
COMMON="--tokenizer examples/stories/_tok.json --cache $T/cache.npz --steps 100000 --max-seconds $1 --compile --eval-documents 500 --text-weight 0.3 --target-accuracy 0.997 --cooldown 500"
i=0
while read -r line; do
  i=$((i+1))
  python3 -m examples.stories.train --out $T/v$i $COMMON $line > $T/v$i.log 2>&1 &
  echo "v$i: $line"
done < examples/stories/_variants.txt
end=$((SECONDS + $1 + 45))
while [ $SECONDS -lt $end ] && [ -n "$(jobs -rp)" ]; do
  if grep -qE "best accuracy (0.99[7-9]|1)" $T/v*.log; then sleep 5; break; fi
  sleep 2
done
kill $(jobs -rp) 2>/dev/null
best=1; bestacc=0
for k in $(seq 1 $i); do
  acc=$(grep -oE "first [0-9.]+" $T/v$k.log | awk '{if($2>m)m=$2}END{print m+0}')
  echo "v$k best first $acc"
  if awk "BEGIN{exit !($acc>$bestacc)}"; then best=$k; bestacc=$acc; fi
  awk 'NR<=8||/stage/||NR%6==0' $T/v$k.log | cut -c1-130; tail -2 $T/v$k.log
done
echo "picked v$best"
mkdir -p $OUT/m; cp $T/v$best/* $OUT/m/; cat $T/v*.log > $OUT/logs.txt
