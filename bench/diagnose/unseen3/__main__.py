from bench.diagnose.unseen.run import main
from bench.diagnose.unseen3.parts import PARTS

main(PARTS)
