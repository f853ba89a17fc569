from bench.diagnose.unseen.parts import PARTS
from bench.diagnose.unseen.run import main

main(PARTS)
