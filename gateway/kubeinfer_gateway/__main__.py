import sys

from kubeinfer_gateway.cli import main

sys.exit(main())
