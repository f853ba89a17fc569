from bench.diagnose.unseen.run import main

main()
