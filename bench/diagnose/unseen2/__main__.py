from bench.diagnose.unseen.run import main
from bench.diagnose.unseen2.parts import PARTS

main(PARTS)
