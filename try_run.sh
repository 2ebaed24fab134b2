# takes up to 280 s
export PYTHONPATH=src:.:$PYTHONPATH PYTHONUNBUFFERED=1
mkdir -p out
python3 -m pytest -p no:benchmark -p no:cacheprovider -p no:xdist --collect-only -q tests/ops/triton/test_attention.py 2>/dev/null | grep :: > out/ids
i=0; for i in 0 1 2 3 4 5; do
  awk "NR % 6 == $i" out/ids > out/ids.$i
  (mapfile -t ids < out/ids.$i; timeout 110 python3 -m pytest -q -p no:benchmark -p no:cacheprovider -p no:xdist "${ids[@]}" > out/test.$i 2>&1) &
done
for i in 0 1 2 3 4 5 6 7; do timeout 100 python3 try_tune.py warm $i 8 2>&1 | tail -5 & done
(timeout 110 python3 benchmarks/gpu/attention.py --check > out/check 2>&1) &
(timeout 110 python3 try_tune.py plain > out/check2 2>&1) &
wait
echo "== warm took $SECONDS s"; cat out/check | tail -30; cat out/check2 | tail -20; for i in 0 1 2 3 4 5; do grep -h "^FAILED\|^E  \|passed\|failed\|rror" out/test.$i | cut -c1-220 | head -12; done
LIMIT=40 timeout 60 python3 try_tune.py prefill 2>&1 | tail -50
LIMIT=60 timeout 90 python3 try_tune.py decode 2>&1 | tail -100
timeout 60 python3 benchmarks/gpu/attention.py --time 2>&1 | tail -70
