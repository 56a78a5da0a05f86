/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state file: the models that clients had loaded, so that a daemon which
 * was restarted serves them again.  One line each, "BITS GROUP NAME PATH";
 * replaced as a whole.  Without --state these do nothing.  Loop's thread.
 */
#ifndef FQ_DAEMON_STATE_H
#define FQ_DAEMON_STATE_H

struct fq_daemon;

/* Writes the recorded models.  A failure is logged. */
void fq_state_save(struct fq_daemon *daemon);
/* Starts to load what the file names.  What cannot be loaded is logged. */
void fq_state_restore(struct fq_daemon *daemon);

#endif
