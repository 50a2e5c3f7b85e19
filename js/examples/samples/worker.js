// The worker that a bundler makes a file of.
import "edgeprompt/worker";
