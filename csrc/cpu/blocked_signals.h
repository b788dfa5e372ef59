// Threads that signals do not go to.
#pragma once
#include <signal.h>

namespace k2 {

// Signals go to the program's own threads while this lives; threads started meanwhile inherit the mask.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t mask;
    sigfillset(&mask);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&mask, fault);  // a bug stays visible
    pthread_sigmask(SIG_SETMASK, &mask, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace k2
